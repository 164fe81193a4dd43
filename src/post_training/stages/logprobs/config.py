"""The configuration of `entrypoint logprobs`."""

from typing import ClassVar

from post_training.stages.annotation.config import ScoringStageConfig, TemplatedDataConfig
from post_training.stages.training.config import ModelConfig


class LogprobsConfig(ScoringStageConfig):
    """data: rows of branches, or preference rows, which stay such; the template is the training's.
    model: whose log-probabilities; the one that will be trained."""

    keeps_pairs: ClassVar[bool] = True

    data: TemplatedDataConfig
    model: ModelConfig
