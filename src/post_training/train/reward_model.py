"""Prepare the pairs, train, write `RUN/model`: a model for sequence classification with one output,
its tokenizer, and the chat template it was trained with. `entrypoint rewards` reads all three.

RUN/data/   token ids and rows (data/pairs/dataset.py)
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import UsageError
from post_training.data.pairs.dataset import PairDataset
from post_training.data.prepared.dataset import metrics_of
from post_training.data.reading import Reader
from post_training.data.rows import Row
from post_training.data.sources import Source
from post_training.models.attention import check_positions
from post_training.models.device import be_deterministic
from post_training.models.load import check_vocabulary, load_untrained_reward_model
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext, remove_leftovers
from post_training.stages.prepared_data import PairPreparation
from post_training.train.config import RewardModelConfig
from post_training.train.dpo_loss import PairBatch, PairCollator
from post_training.train.session import Rows, run_training
from post_training.train.trainer import Count, Trainer


def run(config: RewardModelConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.templates import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.train.policy import check_requirements

    check_requirements(config)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "data"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    preparation = TextPairPreparation(context, config.data, config.pairs, tokenizer, config.seed)
    return train(config, context, tokenizer, preparation.open_or_prepare())


# Pairs as a reward model reads them: whole conversations, by its own tokenizer and template.


@dataclass(frozen=True)
class TextReader(Reader):
    """Without the token ids that were sampled: they may be another tokenizer's, and when the model
    judges, there is only the text."""

    def parse(self, value: dict[str, Any], dataset: int) -> list[Row]:
        texts = {name: cell for name, cell in value.items() if not name.endswith("_token_ids")}
        return super().parse(texts, dataset)


@dataclass(frozen=True)
class TextPairPreparation(PairPreparation):
    limits_key: ClassVar[str] = "pairs"

    def _sources(self) -> tuple[list[Source], Reader]:
        sources, reader = super()._sources()
        own = TextReader(reader.config, reader.formats, reader.train_on, reader.train_on_thoughts)
        return sources, own


# The loss of a reward model.
#
#     L = −log σ(r_chosen − r_rejected) + λ (r_chosen + r_rejected)²      averaged over the pairs
#
# Bradley-Terry (https://arxiv.org/abs/2203.02155, equation 1); the second term, which keeps rewards
# around zero, is that of https://arxiv.org/abs/2312.09244.


def pair_losses(chosen_N: Tensor, rejected_N: Tensor, center_coefficient: float) -> Tensor:
    """float32 [N], of each pair. chosen_N, rejected_N: rewards, float32."""
    losses_N = -logsigmoid(chosen_N - rejected_N)
    if center_coefficient:
        losses_N = losses_N + center_coefficient * (chosen_N + rejected_N).square()
    return losses_N


# The trainer of `entrypoint reward-model`.


class RewardTrainer(Trainer):
    """center_coefficient: of losses.py."""

    def __init__(self, *, center_coefficient: float, **others: Any):
        self._center_coefficient = center_coefficient
        self._num_pairs = 0.0
        super().__init__(**others)

    def prepare_step(self, batches: list[PairBatch]) -> None:
        [self._num_pairs] = self.all_ranks_sum([sum(batch.num_pairs for batch in batches)])

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
        tensors = {name: tensor.to(self.args.device) for name, tensor in batch.inputs.items()}
        rewards = model(**tensors, use_cache=False).logits.float().squeeze(1)
        chosen, rejected = rewards[0::2], rewards[1::2]
        losses = pair_losses(chosen, rejected, self._center_coefficient)
        loss = losses.sum() * (self._context.ranks.world_size / self._num_pairs)
        margins = (chosen - rejected).detach().double()
        sums = {
            "num_pairs": float(batch.num_pairs),
            "rewards/chosen": chosen.detach().double().sum(),
            "rewards/rejected": rejected.detach().double().sum(),
            "rewards/margins": margins.sum(),
            "rewards/accuracies": (margins > 0).double().sum(),
        }
        self.count(
            Count(
                loss=loss.detach(),
                rows=batch.rows,
                num_sequences=batch.num_pairs,
                num_tokens=batch.num_tokens,
                num_trained_tokens=batch.num_tokens,
                sum_of_squared_lengths=batch.sum_of_squared_lengths,
                sums=sums,
            )
        )
        return loss

    def derived_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the pairs."""
        number = sums["num_pairs"]
        return {name: total / number for name, total in sums.items() if name != "num_pairs"}


# From prepared pairs to a reward model's folder.


def train(
    config: RewardModelConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
) -> Result:
    """Errors: see `run_training`; UsageError for a tokenizer without a token to pad with."""
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
    )
    tokenizer.chat_template = dataset.template.text
    counts = dataset.record["counts"]
    shuffled = config.training.shuffle and not config.data.debug_oom
    rows = Rows(counts, None, shuffled=shuffled, folders=("data",))
    load = partial(_load, config, tokenizer, counts["longest_sequence"])
    make_trainer = partial(
        RewardTrainer, collator=collator, center_coefficient=config.center_rewards_coefficient
    )
    result = run_training(config, context, load, tokenizer, rows, make_trainer, scores_tokens=False)
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
