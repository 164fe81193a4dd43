"""The configuration of `entrypoint convert-tokenizer`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from post_training.config.model import Role
from post_training.stages.config import StageConfig
from post_training.stages.tokenize.config import ControlTokensConfig


class ConvertTokenizerConfig(StageConfig):
    """sentencepiece_model: the .model file. corpus: files of rows, as JSONL and the like; the ids
    of every string in them must be equal. control_tokens: as in `tokenize`, where there are any.
    eod: the piece that ends a document; it becomes the tokenizer's eos token.
    """

    sentencepiece_model: Annotated[Path, Role.INPUT]
    corpus: Annotated[list[Path], Role.INPUT, Field(min_length=1)]
    control_tokens: ControlTokensConfig | None = None
    eod: str | None = None
