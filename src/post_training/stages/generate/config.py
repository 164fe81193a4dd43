"""The configuration of `entrypoint generate`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from post_training.config.model import Config, Role
from post_training.stages.annotation.config import (
    ChunkedStageConfig,
    TemplatedDataConfig,
    VllmConfig,
    check_backend,
)
from post_training.stages.training.config import ModelConfig


class SamplingConfig(Config):
    """n: samples of each prompt. temperature: 0 takes the likeliest token. top_p: the smallest set
    of tokens with this probability is drawn from. max_tokens: a sample that reaches it is
    truncated, its finish_reason `length`. stop: texts that end a sample; they are not part of its
    text, but their tokens are stored.
    """

    n: PositiveInt = 10
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 4096
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _different_samples(self) -> "SamplingConfig":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n: temperature 0 gives one sample {self.n} times; set n: 1")
        return self


class GenerateConfig(ChunkedStageConfig):
    """model_name: what a branch's metadata call the model; by default the fingerprint of its
    folder, which they hold in any case. exclude_truncated: truncated samples are left out, not
    only marked.
    """

    version: ClassVar[int] = 2

    model: ModelConfig
    data: TemplatedDataConfig
    sampling: SamplingConfig = SamplingConfig()
    backend: Annotated[Literal["transformers", "vllm"], Role.TOPOLOGY] = "transformers"
    vllm: VllmConfig = VllmConfig()
    model_name: str | None = None
    exclude_truncated: bool = False

    @model_validator(mode="after")
    def _settings_of_the_backend(self) -> "GenerateConfig":
        check_backend(self)
        return self
