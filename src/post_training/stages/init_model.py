"""Train the tokenizer on the corpus, draw the weights from the seed, write `RUN/model`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.data.chat.templates import MARKERS, choose_template, template_text
from post_training.data.sources.open import read_objects
from post_training.models.save import create_model, save_model_folder, stop_at, train_tokenizer
from post_training.stages.config import InitModelConfig
from post_training.stages.context import Result, StageContext

SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)


def run(config: InitModelConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _create(config, context))
    return Result(artifacts={"model": "model"}, metrics=metrics)


def _create(config: InitModelConfig, context: StageContext) -> dict[str, float]:
    tokenizer = train_tokenizer(
        (text for path in config.corpus for text in _texts(path)),
        config.vocab_size,
        MARKERS[config.chat_template],
        template_text(config.chat_template),
    )
    template = choose_template(config.chat_template, tokenizer)
    shape = {name: getattr(config, name) for name in SHAPE}
    model = create_model(config.architecture, shape, tokenizer, config.seed)
    stop_at(model, tokenizer, template.end_of_turn)
    save_model_folder(context.run_dir / "model", model, tokenizer)
    num_parameters = model.num_parameters()
    context.log(
        f"{config.architecture} with {num_parameters:,} parameters; "
        f"{len(tokenizer)} of at most {config.vocab_size} tokens"
    )
    return {"num_parameters": num_parameters, "num_tokens_in_vocabulary": len(tokenizer)}


def _texts(path: Path) -> Iterator[str]:
    for row in read_objects(path):
        yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in its order; not the names of its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
