"""What a stage is given, and what it gives back.

Every rank calls the stage's `run(config, context)`. Rank 0 is the only writer; it does its share
in `on_writer` while the others wait, and its error is everybody's error.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from post_training.core.errors import PostTrainingError
from post_training.core.watched_inputs import WatchedInputs
from post_training.records.run_record import RunDescription

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the processes of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_writer(self) -> bool:
        return self.rank == 0


class PeerFailed(PostTrainingError):
    """Rank 0 failed; it reports the reason, the other ranks only end."""


@dataclass(frozen=True)
class StageContext:
    """run_dir: the run folder, which exists. resuming: an earlier attempt of this run left its
    files there (same recipe and topology). group: the torch.distributed group in which the other
    ranks wait for rank 0; None is the default group. input_fingerprints: of each INPUT setting, by
    its dotted key. description: what the run is, as its record says it; None where there is no
    record. allow_topology_change: as it was asked for on the command line. inputs: to be checked
    before anything is kept that was made of them; `execute` does it at the end."""

    run_dir: Path
    ranks: Ranks = field(default_factory=Ranks)
    resuming: bool = False
    group: Any = None
    input_fingerprints: dict[str, str] = field(default_factory=dict)
    description: RunDescription | None = None
    allow_topology_change: bool = False
    inputs: WatchedInputs = field(default_factory=WatchedInputs)

    def on_writer(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 while the others wait; every rank gets its (picklable) result.

        Errors: what `function` raises on rank 0; PeerFailed on the other ranks.
        """
        if self.ranks.world_size == 1:
            return function()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        error: BaseException | None = None
        if self.ranks.is_writer:
            try:
                outcome[1] = function()
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
        if self.ranks.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def log(self, text: str) -> None:
        """One line to stderr, from rank 0 only."""
        if self.ranks.is_writer:
            print(text, file=sys.stderr, flush=True)


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
