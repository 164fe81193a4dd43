"""From prepared pairs to a reward model's folder."""

from dataclasses import replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import UsageError
from post_training.data.pairs.dataset import PairDataset
from post_training.data.prepared.dataset import figures
from post_training.models.device import be_deterministic
from post_training.models.load import check_vocabulary, load_untrained_reward_model
from post_training.models.positions import check_positions
from post_training.stages.context import Result, StageContext
from post_training.stages.dpo.collator import PairCollator
from post_training.stages.reward_model.config import RewardModelConfig
from post_training.stages.reward_model.trainer import RewardTrainer
from post_training.stages.training.session import Rows, run_training


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
    return replace(result, metrics={**figures(dataset.record), **result.metrics})


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
