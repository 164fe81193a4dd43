"""Settings of one backend of `generate` and `logprobs` are refused under the other."""

from typing import Any

import pytest
from pydantic import ValidationError

from post_training.annotate.config import ChunkedStageConfig, GenerateConfig, LogprobsConfig
from post_training.config.model import Role, settings_by_role

EITHER = pytest.mark.parametrize("stage", [GenerateConfig, LogprobsConfig])


def made(stage: type[ChunkedStageConfig], **settings: Any) -> ChunkedStageConfig:
    plain = {
        "model": {"path": "model"},
        "data": {"chat_template": "chatml", "datasets": [{"path": "rows.jsonl"}]},
    }
    return stage.model_validate({**plain, **settings})


def check_refused_with_vllm(stage: type[ChunkedStageConfig], key: str, **settings: Any) -> None:
    made(stage, **settings)
    with pytest.raises(ValidationError, match=f"{key} is no setting of backend: vllm"):
        made(stage, backend="vllm", **settings)


@pytest.mark.parametrize("key", ["max_batch_tokens", "prompts_per_batch", "tensor_parallel_size"])
def test_settings_of_transformers_are_refused_with_vllm(key: str):
    check_refused_with_vllm(LogprobsConfig, key, **{key: 2})


@EITHER
def test_attention_of_transformers_is_refused_with_vllm(stage: type[ChunkedStageConfig]):
    model = {"path": "model", "attn_implementation": "eager"}
    check_refused_with_vllm(stage, "model.attn_implementation", model=model)


@EITHER
def test_settings_of_vllm_are_refused_with_transformers(stage: type[ChunkedStageConfig]):
    settings = {"vllm": {"tensor_parallel_size": 2}}
    assert made(stage, backend="vllm", **settings).vllm.tensor_parallel_size == 2
    with pytest.raises(ValidationError, match="vllm is no setting of backend: transformers"):
        made(stage, **settings)


@EITHER
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_saved_settings_of_a_backend_are_read_again_as_they_were(
    stage: type[ChunkedStageConfig], backend: str
):
    config = made(stage, backend=backend)
    assert stage.model_validate(config.model_dump(mode="json")) == config


def test_float32_logits_are_of_transformers_and_of_16_bits():
    wanted = {"path": "model", "float32_logits": True}
    in_16_bits = {**wanted, "dtype": "bfloat16"}
    assert made(LogprobsConfig, model=in_16_bits).model.float32_logits
    with pytest.raises(ValidationError, match="logits are float32 already"):
        made(LogprobsConfig, model=wanted)
    with pytest.raises(ValidationError, match="float32_logits: only with backend: transformers"):
        made(LogprobsConfig, backend="vllm", model=in_16_bits)
    with pytest.raises(ValidationError, match="float32_logits"):
        made(GenerateConfig, model=in_16_bits)


def test_backend_of_logprobs_is_recipe_as_its_rows_say_whose_they_are():
    config = made(LogprobsConfig, backend="vllm")
    assert settings_by_role(config)[Role.RECIPE]["backend"] == "vllm"
