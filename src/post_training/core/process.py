"""Run external programs, and end them when this process ends."""

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
    """A `preexec_fn` for subprocess: the kernel kills the child when process `parent` ends.

    sent: the signal; another than SIGKILL for a child that has to clean up first.
    Linux only (PR_SET_PDEATHSIG of prctl(2)). An exec of the parent does not count as its end.
    """
    libc = ctypes.CDLL(None)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, sent)
        # The parent may have ended before prctl was called; then no signal will come.
        if os.getppid() != parent:
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

    hint: of the error, where it fails.
    env, cwd: its whole environment and its working folder; ours unless given.
    show: pass its output through to stderr while it runs, and return an empty text.
    ends_with_us: the signal that it gets when this process is killed; unless given, it runs on.
    timeout_s: it is killed after this time.
    Errors: PostTrainingError when the program is missing or fails, with the end of its output;
    NoAnswerError after timeout_s.
    """
    output = run_tool_bytes(
        argv,
        hint=hint,
        env=env,
        cwd=cwd,
        show=show,
        ends_with_us=ends_with_us,
        timeout_s=timeout_s,
    )
    return output.decode(errors="replace").strip()


def run_tool_bytes(
    argv: Sequence[str | Path],
    *,
    hint: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    show: bool = False,
    ends_with_us: signal.Signals | None = None,
    timeout_s: float | None = None,
) -> bytes:
    """As run_tool; stdout as the bytes that it is."""
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
        output = b"\n".join([done.stdout or b"", done.stderr or b""]).decode(errors="replace")
        lines = output.strip().splitlines()[-12:]
        problem = f"{program} failed with exit code {done.returncode}"
        raise PostTrainingError("\n".join([problem, *(f"  {line}" for line in lines)]), hint=hint)
    return done.stdout or b""
