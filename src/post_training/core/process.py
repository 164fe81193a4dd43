"""External programs: run one for its output, or tie one's life to ours."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from post_training.core.errors import NoAnswerError, PostTrainingError

_PR_SET_PDEATHSIG = 1


def dies_with(parent: int, sent: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` that has the child killed when process `parent` ends, however it ends.

    sent: another signal, for a child that has to tidy up.
    Linux only (prctl(2)); the child survives an exec of the parent, which keeps its pid.
    """
    libc = ctypes.CDLL(None)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, sent)
        if os.getppid() != parent:  # It ended before we asked.
            os._exit(1)

    return arrange


def run_tool(
    argv: Sequence[str | Path],
    *,
    hint: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    show: bool = False,
    ends_with_us: signal.Signals | None = None,
    timeout_s: float | None = None,
) -> str:
    """Run `argv` and return its stdout, stripped.

    show: pass the program's own words through to stderr while it runs, and return nothing.
    ends_with_us: what it is sent when this process is killed; else it runs on.
    timeout_s: after which it is killed.
    Errors: PostTrainingError when the program is missing or fails, with the end of its output;
    NoAnswerError after timeout_s.
    """
    said = tool_bytes(
        argv,
        hint=hint,
        env=env,
        cwd=cwd,
        show=show,
        ends_with_us=ends_with_us,
        timeout_s=timeout_s,
    )
    return said.decode(errors="replace").strip()


def tool_bytes(
    argv: Sequence[str | Path],
    *,
    hint: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    show: bool = False,
    ends_with_us: signal.Signals | None = None,
    timeout_s: float | None = None,
) -> bytes:
    """As run_tool, with stdout as it is."""
    program = str(argv[0])
    if shutil.which(program) is None:
        raise PostTrainingError(f"{program}: not installed", hint=hint or "see installation/laptop")
    try:
        done = subprocess.run(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if show else subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            env=env,
            cwd=cwd,
            preexec_fn=dies_with(os.getpid(), ends_with_us) if ends_with_us else None,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{program}: no answer in {timeout_s:g} s", hint=hint) from None
    if done.returncode != 0:
        said = b"\n".join([done.stdout or b"", done.stderr or b""]).decode(errors="replace")
        lines = said.strip().splitlines()[-12:]
        problem = f"{program} failed with exit code {done.returncode}"
        raise PostTrainingError("\n".join([problem, *(f"  {line}" for line in lines)]), hint=hint)
    return done.stdout or b""
