"""The training's own loss over a whole dataset, and prompts and completions apart."""

from typing import Any

import torch
from torch import Tensor

from post_training.data.rows import COMPLETION, PROMPT
from post_training.models.chunked_head import ChunkedHead
from post_training.stages.context import Ranks
from post_training.stages.sft.collator import Collator, MicroBatch
from post_training.stages.sft.losses import Sums, factors, span_losses, token_losses
from post_training.stages.training.evaluation import Evaluation

_SPANS = (("prompt", PROMPT), ("completion", COMPLETION))
_OVERALL = ("num_prompt", "completion_weight", "num_sequences")  # in the order of Sums


class SftEvaluation(Evaluation):
    def __init__(self, collator: Collator, batch_size: int, ranks: Ranks):
        self._loss = collator.loss
        super().__init__(collator, len(collator.dataset), batch_size, ranks)

    def batch_sums(
        self, batch: MicroBatch, model: Any, head: ChunkedHead, device: torch.device
    ) -> dict[str, Tensor | float]:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with head.scoring(batch.targets.to(device), with_top=True):
            logprobs, values, tops = model(**inputs, use_cache=False).logits
        losses = token_losses(logprobs, values, batch.continues.to(device), self._loss).double()
        weights = batch.weights.to(device)
        sums: dict[str, Tensor | float] = dict(zip(_OVERALL, batch.sums.values(), strict=True))
        for name, kind in _SPANS:
            mask = (batch.kinds == kind).to(device).double()
            sums[f"weighted_{name}_loss"] = (mask * weights * losses).sum()
            sums[f"{name}_loss"] = -(mask * logprobs.double()).sum()
            sums[f"num_{name}_tokens"] = mask.sum()
            sums[f"num_{name}_top"] = (mask * tops).sum()
        return sums

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """loss; prompt_loss, prompt_accuracy, completion_loss, completion_accuracy: means over
        the tokens, whatever their weights; an accuracy counts where the target is the likeliest."""
        overall = Sums(*(sums[name] for name in _OVERALL))
        shares = factors(overall, self._loss)
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
