"""Write `RUN/dataset`, which training reads as `data.prepared`: sequences, or pairs."""

from post_training.core.files import remove_leftovers
from post_training.data.chat.templates import with_special_tokens
from post_training.data.prepared.dataset import metrics_of
from post_training.models.load import load_tokenizer
from post_training.stages.config import PrepareConfig
from post_training.stages.context import Result, StageContext
from post_training.stages.prepared_data import (
    DataPreparation,
    PairPreparation,
    num_embedded_ids,
)


def run(config: PrepareConfig, context: StageContext) -> Result:
    tokenizer = with_special_tokens(load_tokenizer(config.tokenizer), config.data.special_tokens)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "dataset"))
    data, seed = config.data, config.seed
    if config.dpo is None:
        preparation = DataPreparation(context, data, config.sft, tokenizer, seed)
    else:
        num_ids = num_embedded_ids(config.tokenizer)
        preparation = PairPreparation(context, data, config.dpo, tokenizer, seed, num_ids=num_ids)
    record = context.on_writer(lambda: preparation.prepare_in(context.run_dir / "dataset"))
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics_of(record))
