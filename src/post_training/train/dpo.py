"""Preference training: prepare the pairs, find the reference's logprobs, train, write `RUN/model`.

RUN/data/          token ids, figures and rows (data/pairs/dataset.py)
RUN/reference/     logprobs of the reference, where they were computed here (dpo_reference.py)
RUN/evaluation/, RUN/evaluation_reference/   the same of the evaluation's pairs
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.core.files import remove_leftovers
from post_training.data.chat.templates import with_special_tokens
from post_training.data.config import DataConfig, PairConfig
from post_training.data.pairs.dataset import NUM_REF_REWARDS, QUANTILE, PairDataset
from post_training.data.prepared.dataset import metrics_of
from post_training.data.rows import SIDES
from post_training.models.attention import check_shared_prompt
from post_training.models.device import be_deterministic
from post_training.models.head import IGNORED, ChunkedHead
from post_training.models.load import load_tokenizer
from post_training.models.router_loss import RouterLoss
from post_training.stages.context import Ranks, Result, StageContext
from post_training.stages.prepared_data import PairPreparation, num_embedded_ids
from post_training.train.config import DpoConfig, PreferenceLossConfig
from post_training.train.dpo_loss import Answers, PairBatch, PairCollator, PairMetrics, pair_losses
from post_training.train.dpo_reference import ReferenceLogprobs, reference_logprobs
from post_training.train.loss import Evaluation, Loss, LossOutput, Scalar
from post_training.train.policy import (
    check_read,
    check_requirements,
    install_head,
    load_policy,
)
from post_training.train.session import Session
from post_training.train.trainer import TrainingData

_REFERENCE = "reference"
_EVALUATION_REFERENCE = f"evaluation_{_REFERENCE}"
# Nats a token between two ways to compute the same logprobs: in float32 up to 1e-5 was seen, and
# 3e-4 between engines; in 16 bits each token is off by about 1e-2, and the mean of an answer less.
_TOLERANCE, _TOLERANCE_IN_16_BITS = 1e-3, 3e-2
_LOSS_TOLERANCE, _LOSS_TOLERANCE_IN_16_BITS = 1e-5, 1e-2


def run(config: DpoConfig, context: StageContext) -> Result:
    """Errors: UsageError and PostTrainingError of the settings, the data and the models; those of
    `Session.train`."""
    check_requirements(config)
    names = ("data", _REFERENCE, "evaluation", _EVALUATION_REFERENCE)
    context.on_writer(lambda: remove_leftovers(context.run_dir, *names))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    num_ids = num_embedded_ids(config.model.path)

    def prepare(data: DataConfig, limits: PairConfig, name: str) -> PairDataset:
        return PairPreparation(
            context, data, limits, tokenizer, config.seed, name=name, num_ids=num_ids
        ).open_or_prepare()

    dataset, evaluation_dataset = prepare(config.data, config.dpo, "data"), None
    if config.evaluation is not None:
        limits = config.dpo.model_copy(update={"packing": "none", "max_seq_length": None})
        evaluation_dataset = prepare(config.evaluation_data(), limits, "evaluation")
    return train(config, context, tokenizer, dataset, evaluation_dataset)


def train(
    config: DpoConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
    evaluation_dataset: PairDataset | None,
) -> Result:
    """From prepared pairs to a model folder: the reference's logprobs, then the policy.

    Errors: see `Session.train` and `reference_logprobs`; PostTrainingError where a loss needs
    figures that pairs don't have.
    """
    be_deterministic()
    # Before the policy is read: the reference's weights are never in memory with it.
    collator, reference = _collator(
        config, context, tokenizer, dataset, _REFERENCE, packed=config.rows_are_packed
    )
    longest = dataset.record["counts"]["longest_sequence"]
    evaluation_collator = None
    if config.evaluation is not None and evaluation_dataset is not None:
        evaluation_collator, _ = _collator(
            config, context, tokenizer, evaluation_dataset, _EVALUATION_REFERENCE, packed=False
        )
        longest = max(longest, evaluation_dataset.record["counts"]["longest_sequence"])
    data = TrainingData(
        collator=collator,
        counts=dataset.record["counts"],
        shuffled=config.training.shuffle and not config.data.debug_oom,
        template=dataset.template,
        folders=("data", "evaluation", _EVALUATION_REFERENCE),
    )
    session = Session.open(config, context, tokenizer, data)
    model = load_policy(config, tokenizer, longest=longest, where="the longest prompt and answer")
    if config.dpo.share_prompt:
        check_shared_prompt(model)
    check_read(config, context, model)
    head = install_head(config, context, model)
    in_16_bits = config.computes_in_16_bits
    tolerance = config.reference.tolerance
    if tolerance is None:
        tolerance = _TOLERANCE_IN_16_BITS if in_16_bits else _TOLERANCE
    loss = DpoLoss(
        config.loss,
        dataset.source_names,
        head,
        RouterLoss.for_model(model),
        tolerance=tolerance if reference.is_start else None,
        closed_form_tolerance=_LOSS_TOLERANCE_IN_16_BITS if in_16_bits else _LOSS_TOLERANCE,
    )
    evaluation = None
    if evaluation_collator is not None:
        evaluation = DpoEvaluation(
            evaluation_collator,
            config.evaluation.per_device_eval_batch_size,
            session.config.evaluation.eval_steps,
            context.ranks,
            config.loss,
            head,
        )
    result = session.train(model, loss, evaluation, base=config.model.path)
    own = {"reference": _REFERENCE} if reference.computed else {}
    return replace(
        result,
        artifacts={**result.artifacts, **own},
        metrics={**metrics_of(dataset.record), **result.metrics},
    )


def _collator(
    config: DpoConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
    name: str,
    *,
    packed: bool,
) -> tuple[PairCollator, ReferenceLogprobs]:
    """name: of the folder in RUN for reference logprobs that are computed."""
    _check_figures(config, dataset)
    reference = reference_logprobs(config, context, tokenizer, dataset, context.run_dir / name)
    collator = PairCollator(
        dataset,
        reference.values,
        # Padding is no part of the attention or of the loss, so any id will do.
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        packed=packed,
        padding_free=config.training.padding_free,
        share_prompt=config.dpo.share_prompt,
        additive_mask=config.model.attn_implementation == "eager",
        pad_to_multiple_of=config.training.pad_to_multiple_of,
    )
    return collator, reference


def _check_figures(config: DpoConfig, dataset: PairDataset) -> None:
    """What qrpo needs of every answer that is trained on."""
    loss = config.loss
    if loss.name != "qrpo":
        return
    found = np.array(dataset.figures[dataset.used_pairs()])  # [U, 2, 3]
    _check_known(found[:, :, QUANTILE], "a quantile reward, or a reward and ref_rewards")
    if loss.quantile_transform in ("log", "normal"):
        numbers = found[:, :, NUM_REF_REWARDS]
        _check_known(numbers, f"ref_rewards, as {loss.quantile_transform} depends on their number")
        if loss.quantile_transform == "normal" and numbers.min() < 2:
            raise PostTrainingError("normal needs at least 2 ref_rewards", where="loss")


def _check_known(values: Float64[np.ndarray, "pairs 2"], what: str) -> None:
    missing = np.isnan(values)
    if missing.any():
        pair, side = np.argwhere(missing)[0]
        raise PostTrainingError(
            f"{int(missing.any(1).sum()):,} of {len(values):,} pairs lack {what} (the first: pair "
            f"{pair}, {SIDES[side]})",
            where="loss.name: qrpo",
            hint="run `entrypoint rewards` and `entrypoint select`",
        )


class DpoLoss(Loss):
    """The losses of dpo_loss.py, on the model's chunked head.

    Before the first update the model is still the reference (unless another was named), and that
    is looked at: its logprobs of the first micro-batch must be those that are used as the
    reference's, and the loss must be what its formula gives for Δ = 0.

    sources: names of the datasets.
    tolerance: by how many nats a token the reference's logprobs may differ from those of the
    untrained model; None where the reference is another model.
    closed_form_tolerance: relative, of the first loss; a larger difference is told.
    """

    def __init__(
        self,
        config: PreferenceLossConfig,
        sources: Sequence[str],
        head: ChunkedHead,
        router: RouterLoss | None,
        *,
        tolerance: float | None,
        closed_form_tolerance: float,
    ):
        self._config = config
        self._pair_metrics = PairMetrics(config, sources)
        self._head = head
        self.router = router
        self._tolerance = tolerance
        self._closed_form_tolerance = closed_form_tolerance

    def totals(self, batch: PairBatch) -> Sequence[float]:
        return [batch.num_pairs]

    def __call__(
        self, model: Any, batch: PairBatch, totals: Sequence[float], scale: float
    ) -> LossOutput:
        """A share of the mean over the pairs."""
        [num_pairs] = totals
        chosen, rejected, router_loss = score_answers(model, self._head, batch, self.router)
        losses = pair_losses(chosen, rejected, self._config)
        return LossOutput(
            loss=(losses.sum() * (scale / num_pairs)).float(),
            num_sequences=batch.num_pairs,
            num_trained_tokens=batch.lengths.sum(),
            sums=self._pair_metrics.sums(chosen, rejected, batch.sources),
            router_loss=router_loss,
        )

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return self._pair_metrics.figures(sums)

    @torch.no_grad()
    def check_untrained(
        self, model: Any, batch: PairBatch, gather: Callable[[Tensor], Tensor]
    ) -> str | None:
        """Errors: PostTrainingError, on every rank, where the reference is not this model."""
        if self._tolerance is None:
            return None
        was_training = model.training
        model.eval()  # without dropout, as the reference
        chosen, rejected, _ = score_answers(model, self._head, batch)
        model.train(was_training)
        answers = (chosen, rejected)
        differences = torch.cat([(each.log_ratios / each.lengths).abs() for each in answers])
        losses = pair_losses(*answers, self._config)
        at_reference = (replace(each, logprobs=each.ref_logprobs) for each in answers)
        expected = pair_losses(*at_reference, self._config)
        found = gather(torch.stack([differences.max(), losses.mean(), expected.mean()]))
        worst = float(found[:, 0].max())
        if not worst <= self._tolerance:  # nor where it is not a number
            raise PostTrainingError(
                f"the reference's logprobs are not those of the untouched model: they differ by "
                f"{worst:.3g} nats a token in the first batch, must be ≤ {self._tolerance:g}",
                where="reference",
                hint="run `entrypoint logprobs` with the model that is trained, or set "
                "reference.logprobs: computed",
            )
        loss, closed = (float(value) for value in found[:, 1:].mean(0))
        if abs(loss - closed) > self._closed_form_tolerance * max(1.0, abs(closed)):
            return f"the untouched model's loss is {loss:.7f}, by its formula {closed:.7f}"
        return None


class DpoEvaluation(Evaluation):
    """The training's own loss and figures over pairs that are not trained on."""

    def __init__(
        self,
        collator: PairCollator,
        batch_size: int,
        eval_steps: int | None,
        ranks: Ranks,
        loss: PreferenceLossConfig,
        head: ChunkedHead,
    ):
        self._loss = loss
        self._pair_metrics = PairMetrics(loss, collator.dataset.source_names)
        self._head = head
        super().__init__(collator, len(collator.dataset), batch_size, eval_steps, ranks)

    def batch_sums(self, batch: PairBatch, model: Any) -> dict[str, Scalar]:
        chosen, rejected, _ = score_answers(model, self._head, batch)
        loss = pair_losses(chosen, rejected, self._loss).sum()
        return {"loss": loss, **self._pair_metrics.sums(chosen, rejected, batch.sources)}

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_pairs"], **self._pair_metrics.figures(sums)}


def score_answers(
    model: Any, head: ChunkedHead, batch: PairBatch, router: RouterLoss | None = None
) -> tuple[Answers, Answers, Float32[Tensor, ""] | None]:
    """What the model has of the chosen and the rejected answers of a batch on its device; and the
    router's loss over its tokens, if that is asked for.

    Sums are float64: a log-ratio is the small difference of two large ones.
    """
    asked = {} if router is None else router.arguments
    with head.scoring(batch.targets):
        outputs = model(**batch.inputs, **asked, use_cache=False)
    logprobs, _, _ = outputs.logits
    predicting = (batch.targets != IGNORED).flatten().nonzero().squeeze(1)
    sums = torch.zeros(2 * batch.num_pairs, dtype=torch.float64, device=logprobs.device).index_add(
        0, batch.answers.flatten()[predicting], logprobs.flatten()[predicting].double()
    )
    both = (
        sums.view(2, -1),
        batch.ref_logprobs,
        batch.lengths,
        batch.quantiles,
        batch.num_ref_rewards,
    )
    chosen, rejected = zip(*both, strict=True)
    router_loss = None if router is None else router.of(outputs, batch.is_token)
    return Answers(*chosen), Answers(*rejected), router_loss
