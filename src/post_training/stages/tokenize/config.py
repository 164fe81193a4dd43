"""The configuration of `entrypoint tokenize`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from post_training.config.model import ADDED_LATER, Config, Role
from post_training.stages.config import StageConfig


class ControlTokensConfig(Config):
    """Ids of the tokens that stand around a turn, before and after it."""

    user: NonNegativeInt = 7
    assistant: NonNegativeInt = 8


class TokenizeConfig(StageConfig):
    """inputs: JSONL files of documents, `{"text": "<<<|user|>>>…<<<|user|>>>…"}`.
    tokenizer: a SentencePiece model, or the folder of a Hugging Face tokenizer.
    eod: the piece that ends a document, where append_eod says so.
    output_prefix: files are OUTPUT_PREFIX_text_document.bin and so on. max_rows: of good documents.
    on_error: of a bad line: stop; leave it out; or also copy it to rejects.jsonl.
    ignore: columns that are not to be read, as in a dataset's settings (data/config.py).
    num_workers: processes; by default one for each core, at most 16.
    """

    inputs: Annotated[list[Path], Role.INPUT, Field(min_length=1)]
    tokenizer: Annotated[Path, Role.INPUT]
    control_tokens: ControlTokensConfig = ControlTokensConfig()
    eod: str = "<|endoftext|>"
    append_eod: bool = True
    output_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "data"
    max_rows: PositiveInt | None = None
    on_error: Literal["fail", "skip", "quarantine"] = "fail"
    ignore: Annotated[list[str], ADDED_LATER] = Field(default_factory=list)
    num_workers: Annotated[PositiveInt | None, Role.PLACEMENT] = None

    @field_validator("ignore")
    @classmethod
    def _reads_text(cls, ignore: list[str]) -> list[str]:
        if "text" in ignore:
            raise ValueError("text: is what is tokenised")
        return ignore
