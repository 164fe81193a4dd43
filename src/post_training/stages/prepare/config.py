"""The configuration of `entrypoint prepare`."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import model_validator

from post_training.config.model import Role
from post_training.data.config import DataConfig, PairConfig, SequenceConfig
from post_training.stages.config import StageConfig


class PrepareConfig(StageConfig):
    """tokenizer: a model folder, or one with a tokenizer alone. data, and sft or dpo: as in a
    training configuration, which can share them by `extends`."""

    version: ClassVar[int] = 2

    tokenizer: Annotated[Path, Role.INPUT]
    data: DataConfig
    sft: SequenceConfig | None = None
    dpo: PairConfig | None = None

    @model_validator(mode="after")
    def _something_to_prepare(self) -> "PrepareConfig":
        if not self.data.datasets:
            raise ValueError("data: set datasets; prepared and indexed are for training")
        if (self.sft is None) == (self.dpo is None):
            raise ValueError("set exactly one of sft, dpo: what the rows are prepared for")
        return self
