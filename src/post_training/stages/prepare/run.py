"""Write `RUN/dataset`, which training reads as `data.prepared`: sequences, or pairs."""

from post_training.data.prepared.dataset import figures
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.leftovers import remove_leftovers
from post_training.stages.prepare.config import PrepareConfig


def run(config: PrepareConfig, context: StageContext) -> Result:
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.special_tokens import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.pair_data import PairPreparation
    from post_training.stages.prepared_data import DataPreparation

    tokenizer = with_special_tokens(load_tokenizer(config.tokenizer), config.data.special_tokens)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "dataset"))
    kind, limits = (
        (DataPreparation, config.sft) if config.dpo is None else (PairPreparation, config.dpo)
    )
    preparation = kind(context, config.data, limits, tokenizer, config.seed)
    record = context.on_writer(lambda: preparation.make(context.run_dir / "dataset"))
    return Result(artifacts={"dataset": "dataset"}, metrics=figures(record))
