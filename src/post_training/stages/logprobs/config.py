"""The configuration of `entrypoint logprobs`."""

from typing import ClassVar, Literal

from pydantic import model_validator

from post_training.stages.annotation.config import (
    ScoringStageConfig,
    TemplatedDataConfig,
    VllmConfig,
    check_backend,
)
from post_training.stages.training.config import ModelConfig

_OF_TRANSFORMERS = ("max_batch_tokens", "prompts_per_batch", "tensor_parallel_size")


class LogprobsConfig(ScoringStageConfig):
    """data: rows of branches, or preference rows, which stay such; the template is the training's.
    model: whose log-probabilities; the one that will be trained.

    backend: who computes them. Measured on CPUs, the two were 2e-7 nats a token apart in float32,
    up to 3.2e-5 with SmolLM2-135M, and 2e-3 in bfloat16. Recipe, so that no dataset holds figures
    of both.
    vllm: of that backend. max_batch_tokens, prompts_per_batch, tensor_parallel_size and
    model.attn_implementation are of transformers alone.
    """

    keeps_pairs: ClassVar[bool] = True

    data: TemplatedDataConfig
    model: ModelConfig
    backend: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _settings_of_the_backend(self) -> "LogprobsConfig":
        check_backend(self, _OF_TRANSFORMERS)
        return self
