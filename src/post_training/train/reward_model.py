"""A reward model: prepare the pairs, train, write `RUN/model`: a model for sequence classification
with one output, its tokenizer, and the chat template it was trained with. `entrypoint rewards`
reads all three.

RUN/data/   token ids and rows (data/pairs/dataset.py)
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …

    L = −log σ(r_chosen − r_rejected) + λ (r_chosen + r_rejected)²      averaged over the pairs

Bradley-Terry (https://arxiv.org/abs/2203.02155, equation 1); the second term, which keeps rewards
around zero, is that of https://arxiv.org/abs/2312.09244.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import UsageError
from post_training.core.files import remove_leftovers
from post_training.data.chat.templates import with_special_tokens
from post_training.data.pairs.dataset import PairDataset
from post_training.data.prepared.dataset import metrics_of
from post_training.models.attention import check_positions
from post_training.models.device import be_deterministic
from post_training.models.load import (
    check_vocabulary,
    load_tokenizer,
    load_untrained_reward_model,
)
from post_training.stages.context import Result, StageContext
from post_training.stages.prepared_data import TextPairPreparation
from post_training.train.config import RewardModelConfig
from post_training.train.dpo_loss import PairBatch, PairCollator
from post_training.train.loss import Loss, LossOutput
from post_training.train.policy import check_read, check_requirements
from post_training.train.session import Session
from post_training.train.trainer import TrainingData


def run(config: RewardModelConfig, context: StageContext) -> Result:
    """Errors: UsageError and PostTrainingError of the settings, the data and the model; those of
    `Session.train`."""
    check_requirements(config)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "data"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    preparation = TextPairPreparation(context, config.data, config.pairs, tokenizer, config.seed)
    return train(config, context, tokenizer, preparation.open_or_prepare())


def train(
    config: RewardModelConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
) -> Result:
    """From prepared pairs to a model folder.

    Errors: see `Session.train`; UsageError for a tokenizer without a token to pad with.
    """
    be_deterministic()
    if tokenizer.pad_token_id is None:
        raise UsageError(
            "a reward model finds the end of a conversation by the pad token, and there is none",
            where=str(config.model.path),
            hint="set data.special_tokens.pad_token",
        )
    collator = PairCollator(
        dataset,
        np.zeros((dataset.num_pairs, 2)),  # there is no reference
        pad_token_id=tokenizer.pad_token_id,
        packed=False,
        padding_free=False,
        share_prompt=False,
        additive_mask=False,
        pad_to_multiple_of=config.training.pad_to_multiple_of,
    )
    tokenizer.chat_template = dataset.template.text
    counts = dataset.record["counts"]
    data = TrainingData(
        collator=collator,
        counts=counts,
        shuffled=config.training.shuffle and not config.data.debug_oom,
        template=None,  # it generates nothing, so it need not stop at an end of turn
        folders=("data",),
    )
    session = Session.open(config, context, tokenizer, data)
    model = _load(config, tokenizer, counts["longest_sequence"])
    check_read(config, context, model)
    # No base: the folder that was read is of another class of models.
    result = session.train(model, RewardLoss(config.center_rewards_coefficient))
    return replace(result, metrics={**metrics_of(dataset.record), **result.metrics})


def _load(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, longest: int
) -> PreTrainedModel:
    model = load_untrained_reward_model(
        config.model.path,
        dtype=config.model.dtype,
        attn_implementation=config.model.attn_implementation,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
    )
    check_vocabulary(model, tokenizer)
    check_positions(model.config, longest, where="the longest prompt and answer")
    return model


class RewardLoss(Loss):
    """center_coefficient: λ."""

    def __init__(self, center_coefficient: float):
        self._center_coefficient = center_coefficient

    def totals(self, batch: PairBatch) -> Sequence[float]:
        return [batch.num_pairs]

    def __call__(
        self, model: Any, batch: PairBatch, totals: Sequence[float], scale: float
    ) -> LossOutput:
        """A share of the mean over the pairs."""
        [num_pairs] = totals
        rewards = model(**batch.inputs, use_cache=False).logits.float().squeeze(1)
        chosen, rejected = rewards[0::2], rewards[1::2]  # the collator's padded layout
        losses = pair_losses(chosen, rejected, self._center_coefficient)
        margins = (chosen - rejected).detach().double()
        return LossOutput(
            loss=losses.sum() * (scale / num_pairs),
            num_sequences=batch.num_pairs,
            num_trained_tokens=batch.num_tokens,
            sums={
                "num_pairs": float(batch.num_pairs),
                "rewards/chosen": chosen.detach().double().sum(),
                "rewards/rejected": rejected.detach().double().sum(),
                "rewards/margins": margins.sum(),
                "rewards/accuracies": (margins > 0).double().sum(),
            },
        )

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the pairs."""
        number = sums["num_pairs"]
        return {name: total / number for name, total in sums.items() if name != "num_pairs"}


def pair_losses(
    chosen_N: Float32[Tensor, " N"], rejected_N: Float32[Tensor, " N"], center_coefficient: float
) -> Float32[Tensor, " N"]:
    """L of each pair. chosen_N, rejected_N: rewards."""
    losses_N = -logsigmoid(chosen_N - rejected_N)
    if center_coefficient:
        losses_N = losses_N + center_coefficient * (chosen_N + rejected_N).square()
    return losses_N
