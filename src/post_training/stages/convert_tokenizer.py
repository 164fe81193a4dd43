"""Convert the model, compare it with the original on the corpus, write `RUN/tokenizer`.

What is compared is the written folder, as transformers loads it; where one id differs, the folder
is not kept.
"""

import shutil
from dataclasses import asdict

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from post_training.core.files import atomic_directory, remove_leftovers
from post_training.data.control.conversion import (
    require_same_ids,
    special_pieces,
    to_fast_tokenizer,
)
from post_training.data.control.documents import (
    SentencePieceSpans,
    control_token,
    end_of_document,
    read_model,
)
from post_training.data.sources.open import open_path
from post_training.stages.config import ConvertTokenizerConfig
from post_training.stages.context import Result, StageContext


def run(config: ConvertTokenizerConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _convert(config, context))
    return Result(artifacts={"tokenizer": "tokenizer"}, metrics=metrics)


def _convert(config: ConvertTokenizerConfig, context: StageContext) -> dict[str, int]:
    model = read_model(config.sentencepiece_model)
    original = SentencePieceSpans(model)
    control_ids = _control_ids(config, original)
    special = special_pieces(model)
    if config.eod is not None:
        special["eos_token"] = config.eod
    remove_leftovers(context.run_dir, "tokenizer")
    target = context.run_dir / "tokenizer"
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    with atomic_directory(target) as folder:
        PreTrainedTokenizerFast(
            tokenizer_object=to_fast_tokenizer(model, control_ids),
            clean_up_tokenization_spaces=False,
            **special,
        ).save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        compared = require_same_ids(
            (
                record
                for path in config.corpus
                for chunk in open_path(path).chunks()
                for record in chunk.records()
            ),
            original,
            lambda texts: loaded(texts, add_special_tokens=False)["input_ids"],
            min(control_ids or original.special_ids, default=None),
        )
    context.log(
        f"{len(loaded):,} pieces; the ids of {compared.num_spans:,} texts "
        f"({compared.num_tokens:,} tokens) are equal"
    )
    return {"vocab_size": len(loaded), **asdict(compared)}


def _control_ids(config: ConvertTokenizerConfig, original: SentencePieceSpans) -> frozenset[int]:
    ids = set()
    if config.control_tokens is not None:
        for name, token in config.control_tokens.model_dump().items():
            ids.add(control_token(original, f"control_tokens.{name}", token))
    if config.eod is not None:
        ids.add(end_of_document(original, config.eod))
    return frozenset(ids)
