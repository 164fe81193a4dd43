"""Prepare the data, train, write `RUN/model`.

RUN/data/          token ids, masks and rows (data/prepared/dataset.py)
RUN/checkpoints/   checkpoint-N: weights, optimizer, schedule, random states, totals
RUN/metrics.jsonl  one line each logging_steps
RUN/model/         the result, loadable by plain transformers
"""

import os

from post_training.core.errors import UsageError
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.leftovers import remove_leftovers
from post_training.stages.sft.config import SftConfig
from post_training.stages.training.config import accumulation_steps


def run(config: SftConfig, context: StageContext) -> Result:
    try:
        num_accumulated = accumulation_steps(config.training, context.ranks.world_size)
    except ValueError as error:
        raise UsageError(str(error), where="training") from None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.special_tokens import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.prepared_data import DataPreparation
    from post_training.stages.sft.training import train

    context.on_writer(lambda: remove_leftovers(context.run_dir, "data", "model", "metrics.jsonl"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    preparation = DataPreparation(context, config.data, config.sft, tokenizer, config.seed)
    return train(config, context, tokenizer, preparation.dataset(), num_accumulated)
