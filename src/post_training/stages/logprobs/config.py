"""The configuration of `entrypoint logprobs`."""

from typing import Annotated, ClassVar

from pydantic import PositiveInt

from post_training.config.model import Role
from post_training.stages.annotation.config import ChunkedStageConfig, TemplatedDataConfig
from post_training.stages.training.config import ModelConfig


class LogprobsConfig(ChunkedStageConfig):
    """data: rows of branches, or preference rows, which stay such; the template is the training's.

    model: whose log-probabilities; the one that will be trained. max_batch_tokens,
    prompts_per_batch: see models/shared_prompt.py. With prompts_per_batch 1 a row's figures depend
    on that row alone.
    """

    keeps_pairs: ClassVar[bool] = True

    data: TemplatedDataConfig
    model: ModelConfig
    max_batch_tokens: Annotated[PositiveInt, Role.TOPOLOGY] = 32768
    prompts_per_batch: Annotated[PositiveInt, Role.TOPOLOGY] = 1
