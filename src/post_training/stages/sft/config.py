"""The configuration of `entrypoint sft`."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from post_training.config.model import Config, not_default
from post_training.data.config import SequenceConfig
from post_training.stages.training.evaluation_config import EvaluatedStageConfig

_OF_IRL = ("irl_gamma", "irl_lambda")


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
        if self.name != "irl" and (of_irl := not_default(self, _OF_IRL)):
            raise ValueError(f"{of_irl[0]} is a setting of irl (name is {self.name})")
        if self.name == "sft" and not_default(self, ["prompt_loss_weight"]):
            raise ValueError("sft has no prompt_loss_weight: it trains on all tokens; use plw")
        return self


class SftConfig(EvaluatedStageConfig):
    version: ClassVar[int] = 2

    sft: SequenceConfig
    loss: LossConfig = LossConfig()

    @property
    def rows_are_packed(self) -> bool:
        return self.sft.packing != "none"
