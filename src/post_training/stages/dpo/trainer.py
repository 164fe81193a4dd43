"""The trainer of `entrypoint dpo`: the losses of losses.py on the model's chunked head.

Before the first update the model is still the reference (unless another was named), and that is
looked at: its logprobs of the first micro-batch must be those that are used as the reference's, and
the loss must be what its formula gives for Δ = 0.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from post_training.core.errors import PostTrainingError
from post_training.stages.dpo.collator import PairBatch
from post_training.stages.dpo.config import LossConfig
from post_training.stages.dpo.losses import pair_losses
from post_training.stages.dpo.metrics import PairMetrics
from post_training.stages.dpo.scoring import score_answers, score_answers_and_router
from post_training.stages.training.trainer import Count, Trainer

_CLOSED_FORM_TOLERANCE = 1e-5


class DpoTrainer(Trainer):
    """tolerance: by how many nats a token the reference's logprobs may differ from those of the
    untouched model; None where the reference is another model. closed_form_tolerance: relative,
    of the first loss; a larger difference is told."""

    def __init__(
        self,
        *,
        loss: LossConfig,
        pair_metrics: PairMetrics,
        tolerance: float | None,
        closed_form_tolerance: float = _CLOSED_FORM_TOLERANCE,
        **others: Any,
    ):
        self._loss = loss
        self._pair_metrics = pair_metrics
        self._tolerance = tolerance
        self._closed_form_tolerance = closed_form_tolerance
        self._num_pairs = 0.0
        super().__init__(**others)

    def prepare_step(self, batches: list[PairBatch]) -> None:
        [self._num_pairs] = self.all_ranks_sum([sum(batch.num_pairs for batch in batches)])
        if self.state.global_step == 0 and self._tolerance is not None:
            self._check_start(batches[0], self._tolerance)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, PairBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the mean over the global batch's pairs, times the number of
        ranks, over which gradients are averaged."""
        batch = inputs["batch"]
        chosen, rejected, router_loss = score_answers_and_router(
            model, self._head, batch, self.args.device, self.router
        )
        losses = pair_losses(chosen, rejected, self._loss)
        loss = (losses.sum() * (self._context.ranks.world_size / self._num_pairs)).float()
        loss, of_router = self.with_router_loss(loss, router_loss)
        self.count(
            Count(
                loss=loss.detach(),
                rows=batch.rows,
                num_sequences=batch.num_pairs,
                num_tokens=batch.num_tokens,
                num_trained_tokens=int(batch.lengths.sum()),
                sum_of_squared_lengths=batch.sum_of_squared_lengths,
                sums={**self._pair_metrics.sums(chosen, rejected, batch.sources), **of_router},
            )
        )
        return loss

    def derived_figures(self, sums: dict[str, float]) -> dict[str, float]:
        return self._pair_metrics.figures(sums)

    @torch.no_grad()
    def _check_start(self, batch: PairBatch, tolerance: float) -> None:
        """Errors: PostTrainingError, on every rank, where the reference is not this model."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()  # without dropout, as the reference
        answers = score_answers(model, self._head, batch, self.args.device)
        model.train(was_training)
        differences = torch.cat([(each.log_ratios / each.lengths).abs() for each in answers])
        losses = pair_losses(*answers, self._loss)
        at_reference = (replace(each, logprobs=each.ref_logprobs) for each in answers)
        expected = pair_losses(*at_reference, self._loss)
        own = torch.stack([differences.max(), losses.mean(), expected.mean()])
        found = self.accelerator.gather(own[None])  # [ranks, 3]
        worst = float(found[:, 0].max())
        if not worst <= tolerance:
            raise PostTrainingError(
                f"the reference's logprobs are not those of the untouched model: they differ by "
                f"{worst:.3g} nats a token in the first batch, must be ≤ {tolerance:g}",
                where="reference",
                hint="run `entrypoint logprobs` with the model that is trained, or set "
                "reference.logprobs: computed",
            )
        loss, closed = (float(value) for value in found[:, 1:].mean(0))
        if abs(loss - closed) > self._closed_form_tolerance * max(1.0, abs(closed)):
            self._context.log(
                f"warning: the untouched model's loss is {loss:.7f}, by its formula {closed:.7f}"
            )
