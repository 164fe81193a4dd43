"""What a killed attempt was writing beside its place (core/files.py)."""

import shutil
from pathlib import Path


def remove_leftovers(run_dir: Path, *names: str) -> None:
    """Remove the unfinished files and folders of `run_dir` that were to become these."""
    for name in names:
        for leftover in run_dir.glob(f".{name}.*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
