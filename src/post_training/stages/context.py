"""What a stage is given, and what it gives back.

Every rank calls the stage's `run(config, context)`, which returns a Result. Rank 0 is the only
writer; it does its share in `on_writer` while the others wait, and its error is everybody's error.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from post_training.core.errors import PostTrainingError, tell
from post_training.core.hashing import WatchedInputs
from post_training.records.run import RunDescription
from post_training.report.page import duration

T = TypeVar("T")


class PeerFailed(PostTrainingError):
    """Rank 0 failed; it reports the reason, the other ranks only end."""


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run.

    group: the torch.distributed group in which the other ranks wait for rank 0; None is the
    default group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    group: Any = None

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    def on_writer(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 while the others wait; every rank gets its (picklable) result.

        Errors: what `function` raises on rank 0; PeerFailed on the other ranks.
        """
        if self.world_size == 1:
            return function()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_writer:
            try:
                outcome[1] = function()
            # Every kind, signals too: a rank that is not told waits for hours.
            except BaseException as raised:
                error = raised
                outcome[0] = str(raised) or type(raised).__name__
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if error is not None:
            raise error
        if outcome[0] is not None:
            raise PeerFailed(f"rank 0 failed: {outcome[0]}")
        return outcome[1]

    def gather(self, value: T) -> list[T]:
        """Every rank's (picklable) value, in the order of the ranks. All ranks call it."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass(frozen=True)
class StageContext:
    """What `execute` tells a stage.

    run_dir: the run folder, which exists.
    ranks: this process among those of the run.
    resuming: an earlier attempt of this run left its files there (same recipe and topology).
    input_fingerprints: of each INPUT setting, by its dotted key.
    description: what the run is, as its record says it; None where there is no record.
    allow_topology_change: as it was asked for on the command line.
    inputs: to be checked before anything is kept that was made of them; `execute` does it at the
    end."""

    run_dir: Path
    ranks: Ranks = field(default_factory=Ranks)
    resuming: bool = False
    input_fingerprints: dict[str, str] = field(default_factory=dict)
    description: RunDescription | None = None
    allow_topology_change: bool = False
    inputs: WatchedInputs = field(default_factory=WatchedInputs)

    def on_writer(self, function: Callable[[], T]) -> T:
        """As Ranks.on_writer."""
        return self.ranks.on_writer(function)

    def gather(self, value: T) -> list[T]:
        """As Ranks.gather."""
        return self.ranks.gather(value)

    def log(self, text: str) -> None:
        """One line to stderr, from rank 0 only."""
        if self.ranks.is_writer:
            tell(text)


@dataclass(frozen=True)
class Result:
    """What a stage made; paths are relative to the run folder.

    artifacts: {kind: folder}, e.g. {"model": "model"}: fingerprinted, and given an artifact.json.
    metrics: final figures for the record; times and speeds under `timing`, a dict.
    state_files: further files whose sha256 is recorded and compared on reproduction.
    unstable_files: files that hold paths or times: listed, never compared.
    """

    artifacts: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    state_files: list[str] = field(default_factory=list)
    unstable_files: list[str] = field(default_factory=list)


_FIRST_LINE_S = 2.0
_LINE_INTERVAL_S = 30.0


class Progress:
    """How far a piece of work is: a bar on a terminal; in a log a line after 2 s, then every 30 s.

    what: a row, a prompt, … total: their number, None where it isn't known. done: how many of them
    an earlier attempt did; they took no time of this one. Silent unless `shown`.
    """

    def __init__(self, what: str, total: int | None, *, shown: bool, done: int = 0):
        self.what = what
        self.total = total
        self._done_before = done
        self._started_at = time.monotonic()
        self._lines = shown and not _can_draw_again()
        self._next_line_at = time.monotonic() + _FIRST_LINE_S
        self._bar = _bar(what, total) if shown and not self._lines else None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, figures: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=figures)
        elif self._lines:
            now = time.monotonic()
            if now >= self._next_line_at or done == self.total:
                self._next_line_at = now + _LINE_INTERVAL_S
                count = f"{done:,}" if self.total is None else f"{done}/{self.total}"
                words = (f"{self.what} {count}", figures, self._time_left(done, now))
                tell(" · ".join(filter(None, words)))

    def _time_left(self, done: int, now: float) -> str:
        """`3 min left`, at the speed of this attempt so far."""
        if self.total is None or not self._done_before < done < self.total:
            return ""
        seconds_each = (now - self._started_at) / (done - self._done_before)
        return f"{duration(seconds_each * (self.total - done))} left"


def _can_draw_again() -> bool:
    """Whether stderr is a terminal that can go back to the start of a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _bar(what: str, total: int | None):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task(what, total=total, figures="")
    return bar
