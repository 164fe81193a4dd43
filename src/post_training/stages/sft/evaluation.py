"""Evaluation: the training's own loss over a whole dataset, and prompts and completions apart.

Batches are of neighbouring rows, in the order of the data; the ranks take them in turn, and their
sums are added in float64. Nothing random happens, so training goes on as if there had been none.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from post_training.data.rows import COMPLETION, PROMPT
from post_training.models.chunked_head import ChunkedHead
from post_training.stages.context import Ranks
from post_training.stages.sft.collator import Collator, MicroBatch
from post_training.stages.sft.config import LossConfig
from post_training.stages.sft.losses import Sums, factors, span_losses, token_losses

_SPANS = (("prompt", PROMPT), ("completion", COMPLETION))


class Evaluation:
    def __init__(self, collator: Collator, batch_size: int, ranks: Ranks):
        self._collator = collator
        self._batch_size = batch_size
        self._ranks = ranks

    def sums(self, model: Any, head: ChunkedHead, device: torch.device) -> Tensor:
        """This rank's sums, float64 on `device`: to be added over the ranks for `figures`."""
        was_training = model.training
        model.eval()
        total = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
        with torch.no_grad():
            for batch, counts in self._batches():
                total += counts * _batch_sums(batch, model, head, self._collator.loss, device)
        model.train(was_training)
        return total

    def figures(self, total: list[float]) -> dict[str, float]:
        """loss; prompt_loss, prompt_accuracy, completion_loss, completion_accuracy: means over
        the tokens, whatever their weights; an accuracy counts where the target is the likeliest."""
        sums = dict(zip(_NAMES, total, strict=True))
        overall = Sums(*(sums[name] for name in _NAMES[:3]))
        shares = factors(overall, self._collator.loss)
        loss = sum(
            share * sums[f"weighted_{name}_loss"]
            for share, (name, _) in zip(shares, _SPANS, strict=True)
        )
        accuracies = {
            f"{name}_accuracy": sums[f"num_{name}_top"] / sums[f"num_{name}_tokens"]
            for name, _ in _SPANS
            if sums[f"num_{name}_tokens"]
        }
        return {"loss": loss, **span_losses(sums), **accuracies}

    def _batches(self) -> Iterator[tuple[MicroBatch, bool]]:
        """(a batch, whether it counts). Sharded weights are gathered in each forward, by all the
        ranks: every rank has as many batches as the others, some for company only."""
        num_rows = len(self._collator.dataset)
        starts = range(0, num_rows, self._batch_size)
        world_size = self._ranks.world_size
        for first in range(0, len(starts), world_size):
            index = first + self._ranks.rank
            start = starts[index] if index < len(starts) else 0
            rows = range(start, min(start + self._batch_size, num_rows))
            yield self._collator([{"row": row} for row in rows])["batch"], index < len(starts)


_NAMES = (
    "num_prompt", "completion_weight", "num_sequences",
    *(f"weighted_{name}_loss" for name, _ in _SPANS),
    *(f"{name}_loss" for name, _ in _SPANS),
    *(f"num_{name}_tokens" for name, _ in _SPANS),
    *(f"num_{name}_top" for name, _ in _SPANS),
)  # fmt: skip


def _batch_sums(
    batch: MicroBatch, model: Any, head: ChunkedHead, loss: LossConfig, device: torch.device
) -> Tensor:
    """float64, in the order of _NAMES."""
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    with head.scoring(batch.targets.to(device), with_top=True):
        logprobs, values, tops = model(**inputs, use_cache=False).logits
    losses = token_losses(logprobs, values, batch.continues.to(device), loss).double()
    masks = [(batch.kinds == kind).to(device).double() for _, kind in _SPANS]
    weights = batch.weights.to(device)
    return torch.stack(
        [
            *torch.tensor(batch.sums.values(), dtype=torch.float64, device=device),
            *((mask * weights * losses).sum() for mask in masks),
            *(-(mask * logprobs.double()).sum() for mask in masks),
            *(mask.sum() for mask in masks),
            *((mask * tops).sum() for mask in masks),
        ]
    )
