"""Prepare the pairs, train, write `RUN/model`: a model for sequence classification with one output,
its tokenizer, and the chat template it was trained with. `entrypoint rewards` reads all three.

RUN/data/   token ids and rows (data/pairs/dataset.py)
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …
"""

import os

from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.leftovers import remove_leftovers
from post_training.stages.reward_model.config import RewardModelConfig


def run(config: RewardModelConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.special_tokens import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.reward_model.data import TextPairPreparation
    from post_training.stages.reward_model.training import train
    from post_training.stages.training.requirements import check_requirements

    check_requirements(config)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "data"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    preparation = TextPairPreparation(context, config.data, config.pairs, tokenizer, config.seed)
    return train(config, context, tokenizer, preparation.dataset())
