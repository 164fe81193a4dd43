"""A program in a terminal, as a person sees it."""

import os
import pty
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

# Colours, bold, dim and the like; not the movements of the cursor, which a bar needs.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def run_in_terminal(
    words: Sequence[str | Path], cwd: Path, *, TERM: str = "xterm-256color", **variables: str
) -> tuple[int, str]:
    """(exit code, all that it wrote, stdout and stderr alike, with the escape codes).

    Of this process' environment nothing is passed on that speaks of colours or of the terminal.
    """
    about_it = {"NO_COLOR", "FORCE_COLOR", "COLORTERM", "GITHUB_ACTIONS", "PY_COLORS", "TERM"}
    kept = {name: value for name, value in os.environ.items() if name not in about_it}
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            words,
            cwd=cwd,
            env={**kept, "TERM": TERM, **variables},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        ) as program:
            os.close(theirs)
            text = _read_to_the_end(ours)
        return program.returncode, text
    finally:
        os.close(ours)


def _read_to_the_end(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:  # EIO: the last process that had the other end is gone.
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode().replace("\r\n", "\n")
