"""The configuration of `entrypoint prepare`."""

from pathlib import Path
from typing import Annotated

from pydantic import model_validator

from post_training.config.model import Role
from post_training.data.config import DataConfig, SequenceConfig
from post_training.stages.config import StageConfig


class PrepareConfig(StageConfig):
    """tokenizer: a model folder, or one with a tokenizer alone. data, sft: as in a training
    configuration, which can share them by `extends`."""

    tokenizer: Annotated[Path, Role.INPUT]
    data: DataConfig
    sft: SequenceConfig

    @model_validator(mode="after")
    def _something_to_prepare(self) -> "PrepareConfig":
        if not self.data.datasets:
            raise ValueError("data: set datasets; prepared and indexed are for training")
        return self
