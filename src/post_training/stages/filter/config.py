"""The configuration of `entrypoint filter`."""

from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from post_training.config.model import Role
from post_training.stages.annotation.config import ChunkedStageConfig, TemplatedDataConfig


class FilterConfig(ChunkedStageConfig):
    """tokenizer: the policy's folder, or one with its tokenizer alone. max_sequence_length: of a
    prompt with a branch, in tokens, by the policy's template. min_branches: a prompt with fewer
    that are short enough is left out; 2, where pairs are to be made of offline branches alone; 0,
    where the rows are prompts without any.
    """

    tokenizer: Annotated[Path, Role.INPUT]
    data: TemplatedDataConfig
    max_sequence_length: PositiveInt
    min_branches: NonNegativeInt = 1
