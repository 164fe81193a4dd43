"""Settings of one backend of `logprobs` are refused under the other."""

from typing import Any

import pytest
from pydantic import ValidationError

from post_training.config.model import Role, settings_by_role
from post_training.stages.logprobs.config import LogprobsConfig


def made(**settings: Any) -> LogprobsConfig:
    plain = {
        "model": {"path": "model"},
        "data": {"chat_template": "chatml", "datasets": [{"path": "rows.jsonl"}]},
    }
    return LogprobsConfig.model_validate({**plain, **settings})


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("max_batch_tokens", {"max_batch_tokens": 100}),
        ("prompts_per_batch", {"prompts_per_batch": 2}),
        ("tensor_parallel_size", {"tensor_parallel_size": 2}),
        (
            "model.attn_implementation",
            {"model": {"path": "model", "attn_implementation": "eager"}},
        ),
    ],
)
def test_settings_of_transformers_are_refused_with_vllm(key: str, settings: dict[str, Any]):
    made(**settings)
    with pytest.raises(ValidationError, match=f"{key} is no setting of backend: vllm"):
        made(backend="vllm", **settings)


def test_settings_of_vllm_are_refused_with_transformers():
    settings = {"vllm": {"tensor_parallel_size": 2}}
    assert made(backend="vllm", **settings).vllm.tensor_parallel_size == 2
    with pytest.raises(ValidationError, match="vllm is no setting of backend: transformers"):
        made(**settings)


def test_saved_settings_of_a_backend_are_read_again_as_they_were():
    for config in (made(), made(backend="vllm")):
        assert LogprobsConfig.model_validate(config.model_dump(mode="json")) == config


def test_backend_is_recipe_as_its_rows_say_whose_they_are():
    assert settings_by_role(made(backend="vllm"))[Role.RECIPE]["backend"] == "vllm"
