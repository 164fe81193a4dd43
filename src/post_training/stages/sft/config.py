"""The configuration of `entrypoint sft`."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, model_validator

from post_training.config.model import Config
from post_training.data.config import DataConfig, SequenceConfig
from post_training.stages.training.config import TrainingStageConfig


class LossConfig(Config):
    """name: one of losses.py. prompt_loss_weight: of plw, ln-plw and irl; 0 leaves the prompt out.
    sequence_level_loss: normalise within each sequence, then average over the sequences of the
    global batch, instead of over all its tokens. irl_lambda, irl_gamma: weight of the temporal
    difference and discount."""

    name: Literal["sft", "plw", "ln-plw", "irl"] = "plw"
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1)
    sequence_level_loss: bool = False
    irl_lambda: NonNegativeFloat = 0.5
    irl_gamma: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _only_what_counts(self) -> "LossConfig":
        of_irl = {"irl_lambda", "irl_gamma"} & self.model_fields_set
        if self.name != "irl" and of_irl:
            raise ValueError(f"{sorted(of_irl)[0]} is a setting of irl (name is {self.name})")
        if self.name == "sft" and "prompt_loss_weight" in self.model_fields_set:
            raise ValueError("sft has no prompt_loss_weight: it trains on all tokens; use plw")
        return self


class SftConfig(TrainingStageConfig):
    data: DataConfig
    sft: SequenceConfig
    loss: LossConfig = LossConfig()
