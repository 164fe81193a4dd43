"""The `data` block of a training stage's configuration."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from post_training.config.model import Config, Role


class Columns(Config):
    """Which of a file's own columns hold what: either `messages`, or `prompt` and `completion`."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @model_validator(mode="after")
    def _one_format(self) -> "Columns":
        pair = (self.prompt is not None, self.completion is not None)
        if self.messages is not None and any(pair):
            raise ValueError("map either messages, or prompt and completion, not both")
        if self.messages is None and not all(pair):
            raise ValueError("map messages, or both prompt and completion")
        return self


class DatasetConfig(Config):
    """One JSONL file. Without `columns` its format is read off the first row's column names."""

    path: Annotated[Path, Role.INPUT]
    columns: Columns | None = None


class DataConfig(Config):
    """The files are read one after another, in this order.

    chat_template: the name of one of ours (data/templates), or `model`: the tokenizer's own.
    """

    chat_template: Literal["chatml", "tulu", "model"]
    datasets: Annotated[list[DatasetConfig], Field(min_length=1)]
