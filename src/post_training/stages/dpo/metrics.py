"""What metrics.jsonl says of the pairs of a step, beside the loss.

    rewards/chosen, rewards/rejected   β_y Δ (losses.py), means over the pairs
    rewards/margins                    the difference of the two
    rewards/accuracies                 the share of pairs whose chosen answer has the higher one
    logps/chosen, logps/rejected       log π_θ of an answer, nats
    kl                                 mean of −Δ over both answers: an estimate of KL(π_ref ‖ π_θ)
                                       where the answers are the reference's own samples
    lengths/chosen, lengths/rejected   trained tokens
    quantiles/chosen, …/rejected       mean R of the answers that have one
    quantiles/moved                    the share of answers whose R was moved to where f is finite
    sources/NAME/margins, …/accuracies the same, of each dataset, where there are several

All are means over the global batch, whatever the ranks and micro-batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from post_training.stages.dpo.config import LossConfig
from post_training.stages.dpo.losses import Answers, implicit_rewards, moved_quantiles


class PairMetrics:
    """sources: names of the datasets."""

    def __init__(self, loss: LossConfig, sources: Sequence[str]):
        self._loss = loss
        self._sources = tuple(sources) if len(sources) > 1 else ()

    @torch.no_grad()
    def sums(
        self, chosen: Answers, rejected: Answers, sources: Tensor
    ) -> dict[str, Tensor | float]:
        """Of one micro-batch; they add up over micro-batches and ranks. sources: int64 [N]."""
        margins = implicit_rewards(chosen, self._loss) - implicit_rewards(rejected, self._loss)
        is_higher = (margins > 0).double()
        sums: dict[str, Tensor | float] = {"num_pairs": float(len(margins))}
        for name, answers in (("chosen", chosen), ("rejected", rejected)):
            has_quantile = ~answers.quantiles.isnan()
            sums[f"rewards/{name}"] = implicit_rewards(answers, self._loss).sum()
            sums[f"logps/{name}"] = answers.logprobs.sum()
            sums[f"lengths/{name}"] = answers.lengths.sum()
            sums[f"kl/{name}"] = -answers.log_ratios.sum()
            sums[f"quantiles/{name}"] = answers.quantiles.nansum()
            sums[f"num_quantiles/{name}"] = has_quantile.double().sum()
            sums[f"num_moved/{name}"] = self._num_moved(answers)
        sums["rewards/margins"] = margins.sum()
        sums["rewards/accuracies"] = is_higher.sum()
        for index, name in enumerate(self._sources):
            own = (sources == index).to(margins.device)
            sums[f"sources/{name}/num_pairs"] = own.double().sum()
            sums[f"sources/{name}/margins"] = (own * margins).sum()
            sums[f"sources/{name}/accuracies"] = (own * is_higher).sum()
        return sums

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """From the sums over the global batch."""
        num_pairs = sums["num_pairs"]
        means = (
            *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
            *("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected"),
        )
        figures = {name: sums[name] / num_pairs for name in means}
        figures["kl"] = (sums["kl/chosen"] + sums["kl/rejected"]) / (2 * num_pairs)
        for name in ("chosen", "rejected"):
            if number := sums[f"num_quantiles/{name}"]:
                figures[f"quantiles/{name}"] = sums[f"quantiles/{name}"] / number
        if self._moves:
            moved = sums["num_moved/chosen"] + sums["num_moved/rejected"]
            figures["quantiles/moved"] = moved / (2 * num_pairs)
        for name in self._sources:
            if number := sums[f"sources/{name}/num_pairs"]:
                for figure in ("margins", "accuracies"):
                    key = f"sources/{name}/{figure}"
                    figures[key] = sums[key] / number
        return figures

    @property
    def _moves(self) -> bool:
        return self._loss.name == "qrpo" and self._loss.quantile_transform in ("log", "normal")

    def _num_moved(self, answers: Answers) -> Tensor | float:
        if not self._moves:
            return 0.0
        moved = moved_quantiles(
            answers.quantiles, answers.num_ref_rewards, self._loss.quantile_transform
        )
        return (moved != answers.quantiles).double().sum()
