"""From prepared pairs to a model folder: the reference's logprobs, then the policy and its loss."""

from dataclasses import replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.data.pairs.dataset import PairDataset
from post_training.data.pairs.encode import ANSWERS, NUM_REF_REWARDS, QUANTILE
from post_training.data.prepared.dataset import figures
from post_training.models.attention import check_shared_prompt
from post_training.models.device import be_deterministic
from post_training.stages.context import Result, StageContext
from post_training.stages.dpo.collator import PairCollator
from post_training.stages.dpo.config import DpoConfig
from post_training.stages.dpo.evaluation import DpoEvaluation
from post_training.stages.dpo.metrics import PairMetrics
from post_training.stages.dpo.reference import ReferenceLogprobs, reference_logprobs
from post_training.stages.dpo.trainer import DpoTrainer
from post_training.stages.training.policy import load_policy
from post_training.stages.training.session import Rows, run_training

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
        metrics={**figures(dataset.record), **result.metrics},
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
            f"{pair}, {ANSWERS[side]})",
            where="loss.name: qrpo",
            hint="run `entrypoint rewards` and `entrypoint select`",
        )
