"""steps.jsonl: a line for every step, so that two runs show where they part.

    {"step": 37, "rows": "01f09c3a7b", "loss": 2.0625, "grad_norm": 0.53}

rows: which rows of the dataset each rank had, in their order, as a checksum (`rows_checksum`).
loss: of the global batch. grad_norm: before clipping. Numbers have every digit: equal lines are
equal bits. The file is the same for a run that was killed and resumed.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from post_training.core.files import sync, write_atomic
from post_training.records.run_record import STEPS_NAME


def rows_checksum(rank: int, rows: Sequence[int]) -> int:
    """Of one rank's rows of a step: 32 bits, so that a million ranks add up exactly in float64."""
    return zlib.crc32(f"{rank}:{','.join(map(str, rows))}".encode())


def num_steps_made(run_dir: Path) -> int:
    """By earlier attempts of this run, the last of them perhaps after its newest checkpoint."""
    path = run_dir / STEPS_NAME
    return len(path.read_bytes().splitlines()) if path.exists() else 0


class StepLog:
    """Written by rank 0 (`run_dir` is None on the others). resume, then add for each step."""

    def __init__(self, run_dir: Path | None):
        self._path = None if run_dir is None else run_dir / STEPS_NAME
        self._file: IO[str] | None = None

    def resume(self, step: int) -> None:
        """Continue after `step`: what was written later will be written again."""
        if self._path is None:
            return
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        # One line a step, from the first on: those kept are whole, since a checkpoint syncs them.
        write_atomic(self._path, b"".join(lines[:step]))
        self._file = open(self._path, "a")  # noqa: SIM115 - until the process ends

    def add(self, step: int, rows: int, loss: float, grad_norm: float) -> None:
        """rows: the sum of the ranks' checksums."""
        if self._file is not None:
            line = {"step": step, "rows": f"{rows:010x}", "loss": loss, "grad_norm": grad_norm}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """To be called before a checkpoint counts, which must never know more than this file."""
        if self._path is not None:
            sync(self._path)
