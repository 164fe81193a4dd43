"""What a stage brings to the trainer: its micro-batches, its loss and its evaluation.

A stage's file (sft.py, dpo.py, reward_model.py) has one class of each. The trainer moves batches to
the device, scales, adds up over micro-batches and ranks, and counts; a loss knows none of that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float32, Int64, Shaped
from torch import Tensor

from post_training.models.router_loss import RouterLoss
from post_training.stages.context import Ranks


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rows of the dataset.

    inputs: of the model's forward pass: input_ids, and attention_mask or position_ids; int64, but
    for the mask of a shared prompt, [B, 1, T, T] (dpo_loss.py).
    targets: the id that a position should predict; models.head.IGNORED where there is none.
    is_token: the others are padding.
    rows: their numbers in the dataset.
    num_tokens: without padding.
    sum_of_squared_lengths: over the sequences; what attention costs.
    """

    inputs: dict[str, Shaped[Tensor, "B ..."]]
    targets: Int64[Tensor, "B T"]
    is_token: Bool[Tensor, "B T"]
    rows: tuple[int, ...]
    num_tokens: int
    sum_of_squared_lengths: int

    def to(self, device: torch.device) -> Self:
        """A copy with every tensor on `device`."""
        tensors = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, **tensors)


# Read at the end of a step: to read a tensor at once would make the processor wait for the GPU.
Scalar = Shaped[Tensor, ""] | float | int
# From [{"row": number}, …] to {"batch": MicroBatch}: the Trainer wants mappings on both sides.
Collator = Callable[[list[dict[str, int]]], dict[str, Any]]


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below `length`."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class LossOutput:
    """Of one micro-batch.

    loss: as it is differentiated.
    sums: further figures, which add up over micro-batches and ranks.
    router_loss: of a mixture of experts (models/router_loss.py).
    """

    loss: Float32[Tensor, ""]
    num_sequences: int
    num_trained_tokens: Scalar
    sums: dict[str, Scalar]
    router_loss: Float32[Tensor, ""] | None = None


class Loss(ABC):
    """A loss over the global batch: all micro-batches of a step, on all ranks.

    router: whose loss is trained too, where the model is a mixture of experts.
    """

    router: RouterLoss | None = None

    @abstractmethod
    def totals(self, batch: Any) -> Sequence[float]:
        """What of a micro-batch has to be known for the whole global batch, to divide by."""

    @abstractmethod
    def __call__(self, model: Any, batch: Any, totals: Sequence[float], scale: float) -> LossOutput:
        """A micro-batch's share of the global batch's loss, times `scale`.

        batch: on the model's device.
        totals: the sums of `totals` over the global batch.
        """

    @abstractmethod
    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step, from the sums of `LossOutput.sums` over its global batch."""

    def check_untrained(
        self, model: Any, batch: Any, gather: Callable[[Tensor], Tensor]
    ) -> str | None:
        """Look at the model before the first step; a warning, or None. All ranks call it.

        gather: from [n] to [ranks, n].
        Errors: PostTrainingError, on every rank, where the training must not begin.
        """
        return None


class Evaluation(ABC):
    """Figures of a whole dataset that is not trained on.

    Batches are of neighbouring rows, in the order of the data; the ranks take them in turn, and
    their sums are added in float64. Nothing random happens, so training goes on as if there had
    been none.

    eval_steps: steps between two evaluations; None: only at the end.
    """

    def __init__(
        self,
        collator: Collator,
        num_rows: int,
        batch_size: int,
        eval_steps: int | None,
        ranks: Ranks,
    ):
        self._collator = collator
        self._num_rows = num_rows
        self._batch_size = batch_size
        self._eval_steps = eval_steps
        self._ranks = ranks

    @abstractmethod
    def batch_sums(self, batch: Any, model: Any) -> dict[str, Scalar]:
        """Sums over a batch on the model's device, with the same names for every batch."""

    @abstractmethod
    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """What is told, from the sums over the dataset."""

    def is_due(self, step: int, num_steps: int) -> bool:
        return step == num_steps or (self._eval_steps is not None and step % self._eval_steps == 0)

    def sums(self, model: Any, device: torch.device) -> dict[str, float]:
        """This rank's: to be added over the ranks for `figures`."""
        was_training = model.training
        model.eval()
        totals: dict[str, Scalar] = {}
        with torch.no_grad():
            for batch, counts in self._batches():
                for name, value in self.batch_sums(batch.to(device), model).items():
                    totals[name] = totals.get(name, 0.0) + counts * value
        model.train(was_training)
        return {name: float(total) for name, total in totals.items()}

    def _batches(self) -> Iterator[tuple[MicroBatch, bool]]:
        """(a batch, whether it counts). Sharded weights are gathered in each forward pass, by all
        the ranks: so every rank has as many batches as the others, some for company only."""
        starts = range(0, self._num_rows, self._batch_size)
        world_size = self._ranks.world_size
        for first in range(0, len(starts), world_size):
            index = first + self._ranks.rank
            start = starts[index] if index < len(starts) else 0
            rows = range(start, min(start + self._batch_size, self._num_rows))
            yield self._collator([{"row": row} for row in rows])["batch"], index < len(starts)
