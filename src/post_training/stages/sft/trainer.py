"""The trainer of `entrypoint sft`: the losses of losses.py on the model's chunked head."""

from typing import Any

from torch import Tensor

from post_training.data.rows import COMPLETION, PROMPT
from post_training.stages.sft.collator import MicroBatch, coefficients
from post_training.stages.sft.config import LossConfig
from post_training.stages.sft.losses import Sums, factors, span_losses, token_losses
from post_training.stages.training.trainer import Count, Trainer


class SftTrainer(Trainer):
    def __init__(self, *, loss: LossConfig, **others: Any):
        self._loss = loss
        self._factors = (0.0, 0.0)
        super().__init__(**others)

    def prepare_step(self, batches: list[MicroBatch]) -> None:
        own = sum((batch.sums for batch in batches), Sums())
        self._factors = factors(Sums(*self.all_ranks_sum(own.values())), self._loss)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, MicroBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the global batch's loss, times the number of ranks, over
        which gradients are averaged."""
        batch, device = inputs["batch"], self.args.device
        weights = coefficients(batch, *self._factors)
        scaled = (weights * self._context.ranks.world_size).to(device)
        targets = batch.targets.to(device)
        asked = {} if self.router is None else self.router.arguments
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        if self._loss.name == "irl":
            with self._head.scoring(targets):
                outputs = model(**inputs, **asked, use_cache=False)
            logprobs, values, _ = outputs.logits
            continues = batch.continues.to(device)
            loss = (scaled * token_losses(logprobs, values, continues, self._loss)).sum()
        else:
            with self._head.scoring(targets, scaled):
                outputs = model(**inputs, **asked, use_cache=False)
            loss, logprobs, _ = outputs.logits
        router_loss = None
        if self.router is not None:
            router_loss = self.router.of(outputs, batch.is_token.to(device))
        loss, of_router = self.with_router_loss(loss, router_loss)
        self.count(
            Count(
                loss=loss.detach(),
                rows=batch.rows,
                num_sequences=int(batch.sums.num_sequences),
                num_tokens=batch.num_tokens,
                num_trained_tokens=int((weights != 0).sum()),
                sum_of_squared_lengths=batch.sum_of_squared_lengths,
                sums={**_span_sums(batch, logprobs.detach(), weights != 0), **of_router},
            )
        )
        return loss

    def derived_figures(self, sums: dict[str, float]) -> dict[str, float]:
        return span_losses(sums)


def _span_sums(batch: MicroBatch, logprobs: Tensor, looked_at: Tensor) -> dict[str, Tensor | float]:
    """Cross-entropy and number of tokens of prompts and completions, where it was looked at."""
    sums: dict[str, Tensor | float] = {}
    for name, kind in (("prompt", PROMPT), ("completion", COMPLETION)):
        mask = (batch.kinds == kind) & looked_at
        sums[f"{name}_loss"] = -(logprobs.double() * mask.to(logprobs.device)).sum()
        sums[f"num_{name}_tokens"] = float(mask.sum())
    return sums
