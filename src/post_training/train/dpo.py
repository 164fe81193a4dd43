"""Prepare the pairs, find the reference's logprobs, train, write `RUN/model`.

RUN/data/          token ids, figures and rows (data/pairs/dataset.py)
RUN/reference/     logprobs of the reference, where they were computed here (reference.py)
RUN/evaluation/, RUN/evaluation_reference/   the same of the evaluation's pairs
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …
"""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.data.config import DataConfig, PairConfig
from post_training.data.pairs.dataset import NUM_REF_REWARDS, QUANTILE, PairDataset
from post_training.data.prepared.dataset import metrics_of
from post_training.data.rows import SIDES
from post_training.models.attention import check_shared_prompt
from post_training.models.device import be_deterministic
from post_training.models.head import IGNORED, ChunkedHead
from post_training.models.quiet import quiet_libraries
from post_training.models.router_loss import RouterLoss
from post_training.stages.context import Ranks, Result, StageContext, remove_leftovers
from post_training.train.config import DpoConfig, PreferenceLossConfig
from post_training.train.dpo_loss import Answers, PairBatch, PairCollator, PairMetrics, pair_losses
from post_training.train.dpo_reference import ReferenceLogprobs, reference_logprobs
from post_training.train.evaluation import Evaluation
from post_training.train.policy import load_policy
from post_training.train.session import Rows, run_training
from post_training.train.trainer import Count, Trainer


def run(config: DpoConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.templates import with_special_tokens
    from post_training.data.pairs.dataset import PairDataset
    from post_training.models.load import load_tokenizer
    from post_training.stages.prepared_data import PairPreparation, num_embedded_ids
    from post_training.train.policy import check_requirements

    check_requirements(config)
    names = ("data", "reference", "evaluation", "evaluation_reference")
    context.on_writer(lambda: remove_leftovers(context.run_dir, *names))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)

    num_ids = num_embedded_ids(config.model.path)

    def pairs(data: DataConfig, limits: PairConfig, name: str) -> PairDataset:
        return PairPreparation(
            context, data, limits, tokenizer, config.seed, name=name, num_ids=num_ids
        ).open_or_prepare()

    dataset, evaluation_dataset = pairs(config.data, config.dpo, "data"), None
    if config.evaluation is not None:
        limits = config.dpo.model_copy(update={"packing": "none", "max_seq_length": None})
        evaluation_dataset = pairs(config.evaluation_data(), limits, "evaluation")
    return train(config, context, tokenizer, dataset, evaluation_dataset)


# What a model has of the answers of a batch: the input of every loss and every figure.


def score_answers(
    model: Any, head: ChunkedHead, batch: PairBatch, device: torch.device
) -> tuple[Answers, Answers]:
    """Chosen and rejected, in float64: a ratio is the difference of two large sums."""
    chosen, rejected, _ = score_answers_and_router(model, head, batch, device, None)
    return chosen, rejected


def score_answers_and_router(
    model: Any,
    head: ChunkedHead,
    batch: PairBatch,
    device: torch.device,
    router: RouterLoss | None,
) -> tuple[Answers, Answers, torch.Tensor | None]:
    """As score_answers; and the router's auxiliary loss over the tokens of the batch."""
    targets = batch.targets.to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    of_router = {} if router is None else router.arguments
    with head.scoring(targets):
        outputs = model(**inputs, **of_router, use_cache=False)
    logprobs, _, _ = outputs.logits
    asked = (targets != IGNORED).flatten().nonzero().squeeze(1)
    sums = torch.zeros(2 * batch.num_pairs, dtype=torch.float64, device=device).index_add(
        0, batch.answers.to(device).flatten()[asked], logprobs.flatten()[asked].double()
    )
    of_sides = (sums.view(2, -1), batch.ref_logprobs, batch.lengths, batch.quantiles,
                batch.num_ref_rewards)  # fmt: skip
    chosen, rejected = zip(*(values.to(device) for values in of_sides), strict=True)
    router_loss = None if router is None else router.of(outputs, batch.is_token.to(device))
    return Answers(*chosen), Answers(*rejected), router_loss


# The trainer of `entrypoint dpo`: the losses of losses.py on the model's chunked head.
#
# Before the first update the model is still the reference (unless another was named), and that is
# looked at: its logprobs of the first micro-batch must be those that are used as the reference's,
# and the loss must be what its formula gives for Δ = 0.


_CLOSED_FORM_TOLERANCE = 1e-5


class DpoTrainer(Trainer):
    """tolerance: by how many nats a token the reference's logprobs may differ from those of the
    untouched model; None where the reference is another model. closed_form_tolerance: relative,
    of the first loss; a larger difference is told."""

    def __init__(
        self,
        *,
        loss: PreferenceLossConfig,
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


# The training's own loss and figures (metrics.py) over pairs that are not trained on.


class DpoEvaluation(Evaluation):
    def __init__(
        self, collator: PairCollator, loss: PreferenceLossConfig, batch_size: int, ranks: Ranks
    ):
        self._loss = loss
        self._pair_metrics = PairMetrics(loss, collator.dataset.source_names)
        super().__init__(collator, len(collator.dataset), batch_size, ranks)

    def batch_sums(
        self, batch: PairBatch, model: Any, head: ChunkedHead, device: torch.device
    ) -> dict[str, Tensor | float]:
        chosen, rejected = score_answers(model, head, batch, device)
        loss = pair_losses(chosen, rejected, self._loss).sum()
        return {"loss": loss, **self._pair_metrics.sums(chosen, rejected, batch.sources)}

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_pairs"], **self._pair_metrics.figures(sums)}


# From prepared pairs to a model folder: the reference's logprobs, then the policy and its loss.


# Nats a token between two ways to compute the same logprobs: in float32 up to 1e-5 was seen, and
# 3e-4 between engines; in 16 bits each token is off by about 1e-2, and the mean of an answer less.
_TOLERANCE, _TOLERANCE_IN_16_BITS = 1e-3, 3e-2
_LOSS_TOLERANCE, _LOSS_TOLERANCE_IN_16_BITS = 1e-5, 1e-2
_REFERENCE = "reference"


def train(
    config: DpoConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
    evaluation_dataset: PairDataset | None,
) -> Result:
    """Errors: see `run_training` and `reference_logprobs`; UsageError where a loss needs figures
    that pairs don't have."""
    be_deterministic()
    prepare = partial(_collator, config, context, tokenizer)
    collator, reference = prepare(dataset, _REFERENCE, packed=config.rows_are_packed)
    longest = dataset.record["counts"]["longest_sequence"]
    evaluation, eval_steps = None, None
    if config.evaluation is not None and evaluation_dataset is not None:
        pairs, _ = prepare(evaluation_dataset, f"evaluation_{_REFERENCE}", packed=False)
        batch_size = config.evaluation.per_device_eval_batch_size
        evaluation = DpoEvaluation(pairs, config.loss, batch_size, context.ranks)
        eval_steps = config.evaluation.eval_steps
        longest = max(longest, evaluation_dataset.record["counts"]["longest_sequence"])
    in_16_bits = config.model.dtype == "bfloat16" or config.training.mixed_precision == "bf16"
    tolerance = config.reference.tolerance
    if tolerance is None:
        tolerance = _TOLERANCE_IN_16_BITS if in_16_bits else _TOLERANCE
    make_trainer = partial(
        DpoTrainer,
        loss=config.loss,
        pair_metrics=PairMetrics(config.loss, dataset.source_names),
        collator=collator,
        evaluation=evaluation,
        eval_steps=eval_steps,
        tolerance=tolerance if reference.is_start else None,
        closed_form_tolerance=_LOSS_TOLERANCE_IN_16_BITS if in_16_bits else _LOSS_TOLERANCE,
    )
    rows = Rows(
        dataset.record["counts"],
        dataset.template,
        shuffled=config.training.shuffle and not config.data.debug_oom,
        folders=("data", "evaluation", f"evaluation_{_REFERENCE}"),
    )
    load = partial(_load, config, tokenizer, longest)
    result = run_training(config, context, load, tokenizer, rows, make_trainer)
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
    folder = context.run_dir / name
    reference = reference_logprobs(config, context, tokenizer, dataset, folder)
    collator = PairCollator(
        dataset,
        reference.values,
        # Padding is no part of the attention or of the loss, so any id will do.
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        packed=packed,
        padding_free=config.training.padding_free,
        share_prompt=config.dpo.share_prompt,
        additive_mask=config.model.attn_implementation == "eager",
    )
    return collator, reference


def _load(config: DpoConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> PreTrainedModel:
    model = load_policy(config, tokenizer, longest=longest, where="the longest prompt and answer")
    if config.dpo.share_prompt:
        check_shared_prompt(model)
    return model


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


def _check_known(values: np.ndarray, what: str) -> None:
    missing = np.isnan(values)
    if missing.any():
        pair, side = np.argwhere(missing)[0]
        raise PostTrainingError(
            f"{int(missing.any(1).sum()):,} of {len(values):,} pairs lack {what} (the first: pair "
            f"{pair}, {SIDES[side]})",
            where="loss.name: qrpo",
            hint="run `entrypoint rewards` and `entrypoint select`",
        )
