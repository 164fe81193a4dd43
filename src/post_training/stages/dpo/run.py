"""Prepare the pairs, find the reference's logprobs, train, write `RUN/model`.

RUN/data/          token ids, figures and rows (data/pairs/dataset.py)
RUN/reference/     logprobs of the reference, where they were computed here (reference.py)
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …
"""

import os

from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.dpo.config import DpoConfig
from post_training.stages.leftovers import remove_leftovers


def run(config: DpoConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.special_tokens import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.dpo.training import train
    from post_training.stages.pair_data import PairPreparation, num_embedded_ids
    from post_training.stages.training.requirements import check_requirements

    check_requirements(config)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "data", "reference"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    pairs = PairPreparation(
        context,
        config.data,
        config.dpo,
        tokenizer,
        config.seed,
        num_ids=num_embedded_ids(config.model.path),
    )
    return train(config, context, tokenizer, pairs.dataset())
