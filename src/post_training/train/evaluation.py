"""Evaluation: figures of a whole dataset that is not trained on.

Batches are of neighbouring rows, in the order of the data; the ranks take them in turn, and their
sums are added in float64. Nothing random happens, so training goes on as if there had been none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from post_training.models.head import ChunkedHead
from post_training.stages.context import Ranks


class Evaluation(ABC):
    """collator: from [{"row": number}, …] to {"batch": …}, as a Trainer's."""

    def __init__(
        self,
        collator: Callable[[list[dict[str, int]]], dict[str, Any]],
        num_rows: int,
        batch_size: int,
        ranks: Ranks,
    ):
        self._collator = collator
        self._num_rows = num_rows
        self._batch_size = batch_size
        self._ranks = ranks

    @abstractmethod
    def batch_sums(
        self, batch: Any, model: Any, head: ChunkedHead, device: torch.device
    ) -> dict[str, Tensor | float]:
        """Sums over a batch, with the same names for every batch; they add up."""

    @abstractmethod
    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """What is told, from the sums over the dataset."""

    def sums(self, model: Any, head: ChunkedHead, device: torch.device) -> dict[str, float]:
        """This rank's: to be added over the ranks for `figures`."""
        was_training = model.training
        model.eval()
        totals: dict[str, Tensor | float] = {}
        with torch.no_grad():
            for batch, counts in self._batches():
                for name, value in self.batch_sums(batch, model, head, device).items():
                    totals[name] = totals.get(name, 0.0) + counts * value
        model.train(was_training)
        return {name: float(total) for name, total in totals.items()}

    def _batches(self) -> Iterator[tuple[Any, bool]]:
        """(a batch, whether it counts). Sharded weights are gathered in each forward, by all the
        ranks: every rank has as many batches as the others, some for company only."""
        starts = range(0, self._num_rows, self._batch_size)
        world_size = self._ranks.world_size
        for first in range(0, len(starts), world_size):
            index = first + self._ranks.rank
            start = starts[index] if index < len(starts) else 0
            rows = range(start, min(start + self._batch_size, self._num_rows))
            yield self._collator([{"row": row} for row in rows])["batch"], index < len(starts)
