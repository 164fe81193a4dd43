"""What a run says of its steps: metrics.jsonl for people, steps.jsonl to compare two runs.

Both are the same for a run that was killed and resumed. metrics.jsonl: a line each `logging_steps`.

    {"step": 10, "epoch": 0.5, "loss": 2.1, …, "grad_norm": 1.3, "learning_rate": 0.001,
     "num_rows": 80, "num_sequences": 95, "num_tokens": 5120, "num_trained_tokens": 1830,
     "timing": {"time": "2026-11-21T10:00:00Z", "step_s": 0.5, "tokens_per_s": 1024.0, …}}
    {"step": 10, "eval": {"loss": 2.2, …}, "timing": {"time": …}}

loss, and whatever further figures a stage has beside it: the mean of the steps' values since the
line before, over the steps that have one. A step's loss is that of its global batch. grad_norm
(before clipping) and learning_rate: this step's. num_…: since the beginning, over all ranks; rows
are those of the dataset, each of one sequence or several; padding is no token. Times, speeds
(throughput.py) and memory are under `timing` only: two runs of the same bits differ in them.

An evaluation comes after its step's line and before its checkpoint: what a checkpoint has behind it
is what has no higher step.

steps.jsonl: a line for every step, so that two runs show where they part.

    {"step": 37, "rows": "01f09c3a7b", "loss": 2.0625, "grad_norm": 0.53}

rows: which rows of the dataset each rank had, in their order, as a checksum (`rows_checksum`).
loss: of the global batch. grad_norm: before clipping. Numbers have every digit: equal lines are
equal bits.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import IO, Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import sync, write_atomic
from post_training.records.run_record import STEPS_NAME
from post_training.stages.context import StageContext
from post_training.train.reporters import Reporters
from post_training.train.throughput import Throughput

_COUNTS = ("num_rows", "num_sequences", "num_tokens", "num_trained_tokens")
# Named in an error, at most.
_MOST_RANKS, _MOST_ROWS = 8, 8


@dataclass
class Totals:
    """What has to outlive a stop: kept in each checkpoint.

    figures: since the last line, each step's; loss is one of them.
    """

    num_rows: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all ranks.

    sum_of_squared_lengths: over the sequences; what attention costs.
    figures: further ones, by their name in a line.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_rows: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    sum_of_squared_lengths: int
    figures: dict[str, float] = field(default_factory=dict)


class Metrics:
    """Counts on every rank, writes on rank 0 (`path` is None on the others).

    resume, begin, then add for each step and add_evaluation between them. last, last_evaluation:
    the newest line of its kind; empty before there is one.

    offset: the number before that of the run's first step; logging_steps are counted from there.
    """

    def __init__(
        self,
        path: Path | None,
        logging_steps: int,
        throughput: Throughput | None = None,
        reporters: Reporters | None = None,
        *,
        offset: int = 0,
    ):
        self.path = path
        self.logging_steps = logging_steps
        self.offset = offset
        self.totals = Totals()
        self.last: dict[str, Any] = {}
        self.last_evaluation: dict[str, Any] = {}
        self._throughput = throughput or Throughput()
        self._reporters = reporters or Reporters()

    def resume(self, step: int, totals: Totals) -> None:
        """Continue after `step`: what was written later will be written again."""
        self.totals = totals
        if self.path is None:
            return
        written = self.path.read_bytes().splitlines() if self.path.exists() else []
        lines = [line for text in written if (line := _whole(text)) and line["step"] <= step]
        write_atomic(self.path, "".join(map(_text, lines)))
        for line in lines:
            self._keep(line)
        self._reporters.start(lines)

    def begin(self) -> None:
        """The first step begins now; later calls change nothing."""
        self._throughput.begin()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within doesn't count as training when speed is measured."""
        with self._throughput.paused():
            yield

    def add(self, step: Step, *, last: bool) -> dict[str, Any] | None:
        """Count `step`; return the line it completes, if it does. last: the run ends here.

        Errors: PostTrainingError for a figure that is not finite.
        """
        totals = self.totals
        _check_finite(step.figures, f"step {step.step}")
        for name in _COUNTS:
            setattr(totals, name, getattr(totals, name) + getattr(step, name))
        for name, value in {"loss": step.loss, **step.figures}.items():
            totals.figures.setdefault(name, []).append(value)
        self._throughput.end_step(
            step.num_tokens, step.num_trained_tokens, step.sum_of_squared_lengths
        )
        if (step.step - self.offset) % self.logging_steps and not last:
            return None
        line = {
            "step": step.step,
            "epoch": step.epoch,
            **{name: sum(values) / len(values) for name, values in totals.figures.items()},
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
            **{name: getattr(totals, name) for name in _COUNTS},
            "timing": {"time": _now(), **self._throughput.end_line()},
        }
        totals.figures.clear()
        self._write(line)
        return line

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of an evaluation after `step`, whose checkpoint is yet to come.

        Errors: PostTrainingError for a figure that is not finite.
        """
        _check_finite(figures, f"the evaluation at step {step}")
        self._write({"step": step, "eval": figures, "timing": {"time": _now()}})

    def summary(self) -> dict[str, Any]:
        """Speed and memory of this attempt, for the record: `metrics.timing`, never compared."""
        return self._throughput.summary()

    def _write(self, line: dict[str, Any]) -> None:
        self._keep(line)
        if self.path is None:
            return
        with open(self.path, "a") as file:
            file.write(_text(line))
            file.flush()
            # A checkpoint must never know more than this file.
            os.fsync(file.fileno())
        self._reporters.write(line)

    def _keep(self, line: dict[str, Any]) -> None:
        if "eval" in line:
            self.last_evaluation = line
        else:
            self.last = line


def _check_finite(figures: dict[str, float], where: str) -> None:
    for name, value in figures.items():
        if not isfinite(value):
            raise PostTrainingError(f"{name} is not finite (got {value})", where=where)


def _whole(text: bytes) -> dict[str, Any] | None:
    """The line; None for one that a kill cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


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

    def resume(self, num_made: int) -> None:
        """Continue after so many steps: what was written later will be written again."""
        if self._path is None:
            return
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        # One line a step, from the first on: those kept are whole, since a checkpoint syncs them.
        write_atomic(self._path, b"".join(lines[:num_made]))
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


@dataclass(frozen=True)
class MicroBatchLoss:
    """Of one micro-batch on this rank. rows: their numbers in the dataset."""

    loss: float
    rows: tuple[int, ...]


def stop_unless_finite(
    step: int,
    loss: float,
    grad_norm: float,
    micro_batches: Sequence[MicroBatchLoss],
    context: StageContext,
) -> None:
    """Return if loss and gradient norm are finite: else the update would spoil the weights. All
    ranks call it, before the update.

    It costs nothing: all ranks know the two numbers. Only when one is not finite do they tell each
    other which of their rows it was.

    loss, grad_norm: of the global batch, the same on every rank.
    micro_batches: this rank's.
    Errors: PostTrainingError, the same on every rank. It names the rows of the micro-batches whose
    loss is not finite; of all of them, where only the gradient isn't.
    """
    if isfinite(loss) and isfinite(grad_norm):
        return
    name, value = ("gradient norm", grad_norm) if isfinite(loss) else ("loss", loss)
    suspects = [batch for batch in micro_batches if not isfinite(batch.loss)]
    own = [str(row) for batch in suspects or micro_batches for row in batch.rows]
    found = context.gather((bool(suspects), own))
    blamed = any(is_suspect for is_suspect, _ in found)
    listed = {
        rank: rows for rank, (is_suspect, rows) in enumerate(found) if is_suspect or not blamed
    }
    raise PostTrainingError(
        f"{name} is not finite at step {step} (got {value}) with {'; '.join(_listing(listed))}; "
        "stopped before its update counts",
        hint="lower training.learning_rate, raise training.warmup, or look at these rows",
    )


def _listing(rows_of_rank: dict[int, list[str]]) -> Iterator[str]:
    for rank, rows in list(rows_of_rank.items())[:_MOST_RANKS]:
        more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
        yield f"rows {', '.join(rows[:_MOST_ROWS])}{more} on rank {rank}"
    if len(rows_of_rank) > _MOST_RANKS:
        yield f"others on {len(rows_of_rank) - _MOST_RANKS} more ranks"
