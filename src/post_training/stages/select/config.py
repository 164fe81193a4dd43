"""The configuration of `entrypoint select`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from post_training.config.model import Config
from post_training.data.config import SourcesConfig
from post_training.stages.config import StageConfig

STRATEGIES = ("best-worst", "quantile-buckets", "random", "margin")
_OF_A_MIXTURE = ("subsample_factor", "duplication_factor", "max_rows", "max_tokens", "weight")


class StrategyConfig(Config):
    """name: one of strategies.py. num_pairs: of a prompt, at most; no branch is in two of them.

    min_margin, max_margin: of margin: between the rewards of a pair. best_quantile,
    worst_quantile: of quantile-buckets: the best have at least this one, the worst at most this
    one, or 1/num_ref_rewards where that is more.
    """

    name: Literal[STRATEGIES] = "best-worst"
    num_pairs: PositiveInt = 1
    min_margin: NonNegativeFloat | None = None
    max_margin: NonNegativeFloat | None = None
    best_quantile: Annotated[float, Field(ge=0, le=1)] | None = None
    worst_quantile: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _only_what_counts(self) -> "StrategyConfig":
        for strategy, names in (
            ("margin", ("min_margin", "max_margin")),
            ("quantile-buckets", ("best_quantile", "worst_quantile")),
        ):
            given = [name for name in names if getattr(self, name) is not None]
            if given and self.name != strategy:
                raise ValueError(f"{given[0]} is a setting of {strategy} (name is {self.name})")
        if self.name == "margin" and self.min_margin is None:
            raise ValueError("margin needs a min_margin")
        return self


class SelectConfig(StageConfig):
    """reward: the one that decides, where the branches have several.
    samples: which branches may be chosen or rejected: those that the model generated for
    reference, the others, or both. Quantiles are always taken over the reference ones.
    num_ref_rewards: use the first so many reference rewards; by default all. min_ref_rewards: a
    prompt with fewer is left out. exclude_truncated: a branch that was cut off is no candidate; it
    still counts among the reference rewards.
    """

    data: SourcesConfig
    reward: str | None = None
    samples: Literal["reference", "offline", "both"] = "reference"
    strategy: StrategyConfig = StrategyConfig()
    num_ref_rewards: PositiveInt | None = None
    min_ref_rewards: Annotated[int, Field(ge=0)] = 1
    exclude_truncated: bool = True

    @model_validator(mode="after")
    def _whole_datasets(self) -> "SelectConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        for index, dataset in enumerate(self.data.datasets):
            for key in _OF_A_MIXTURE:
                if getattr(dataset, key) is not None:
                    raise ValueError(f"data.datasets[{index}].{key}: mix the pairs instead")
        return self

    @model_validator(mode="after")
    def _quantiles_of_something(self) -> "SelectConfig":
        if self.strategy.name == "quantile-buckets" and self.min_ref_rewards == 0:
            raise ValueError("min_ref_rewards: quantile-buckets needs at least 1")
        return self
