"""The configuration of `entrypoint rewards`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from post_training.config.model import Config, Role, not_default
from post_training.data.config import TEMPLATES
from post_training.stages.annotation.config import ScoringStageConfig
from post_training.stages.training.config import ModelConfig


class RewardConfig(Config):
    """One reward, which a branch will have as rewards.NAME: of a model or of a function.

    function: registered in one of the files of `functions`. model: for sequence classification,
    with one output; it reads conversations by its own template (`model`), or by one of ours.
    max_seq_length: of a conversation in the model's tokens; by default its positions. overlong: a
    longer one is refused, or judged by its beginning and marked, in reward_is_truncated.
    """

    name: Annotated[str, Field(min_length=1)]
    function: str | None = None
    model: ModelConfig | None = None
    chat_template: Literal[(*TEMPLATES, "model")] = "model"
    max_seq_length: PositiveInt | None = None
    overlong: Literal["refuse", "mark"] = "refuse"

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardConfig":
        if (self.function is None) == (self.model is None):
            raise ValueError("set exactly one of function, model")
        changed = not_default(self, ("chat_template", "max_seq_length", "overlong"))
        if self.function is not None and changed:
            raise ValueError(f"{changed[0]} is a setting of a model's reward")
        return self


class RewardsConfig(ScoringStageConfig):
    """functions: Python files that register the functions which the rewards name
    (data/rewards.py)."""

    rewards: Annotated[list[RewardConfig], Field(min_length=1)]
    functions: Annotated[list[Path], Role.INPUT] = Field(default_factory=list)

    @field_validator("rewards")
    @classmethod
    def _names_of_their_own(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        names = [reward.name for reward in rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rewards are called {twice[0]!r}")
        return rewards
