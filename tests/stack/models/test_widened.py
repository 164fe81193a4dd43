"""A model of bfloat16 that computes in float32 for a trial."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from post_training.core.errors import PostTrainingError
from post_training.models.attention import check_packing
from post_training.models.widened import computing_in_float32

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
         "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},  # weights beside its layers, and tied ones
    "gpt_neox": {},
    "granite": {"num_key_value_heads": 1},
    "qwen3_moe": {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 8, "head_dim": 8},
}  # fmt: skip


def tiny(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **FAMILIES[model_type]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(20)[None], use_cache=False).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_a_copy_in_float32_and_the_weights_stay(model_type: str):
    model = tiny(model_type)
    expected = logits_of(copy.deepcopy(model).float())
    before = {name: (each, each.data_ptr()) for name, each in model.named_parameters()}
    narrow = logits_of(model)
    with computing_in_float32(model):
        found = logits_of(model)
    assert torch.equal(found, expected)
    assert not torch.equal(narrow.float(), expected)
    assert before == {name: (each, each.data_ptr()) for name, each in model.named_parameters()}
    assert torch.equal(logits_of(model), narrow)


def test_only_the_layer_that_computes_is_wider():
    model = tiny("gpt_neox")
    wide = []

    def note(*_: Any) -> None:
        named = model.named_parameters()
        wide.append([name for name, each in named if each.dtype == torch.float32])

    with computing_in_float32(model):
        for layer in model.gpt_neox.layers:
            layer.attention.register_forward_pre_hook(note)
        logits_of(model)
    for number, names in enumerate(wide):
        prefix = f"gpt_neox.layers.{number}."
        assert names == [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    assert len(wide) == 2


def test_weights_are_narrow_again_after_an_error():
    model = tiny("gpt_neox")

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the middle of a layer")

    model.gpt_neox.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError), computing_in_float32(model):
        logits_of(model)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weak_leak_is_found_whatever_the_dtype(dtype: torch.dtype):
    """In bfloat16 it is less than rounding."""
    model = tiny("gpt_neox").to(dtype)
    check_packing(model)

    def leak(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 3e-3 * output.mean(1, keepdim=True)

    model.gpt_neox.layers[0].register_forward_hook(leak)
    with pytest.raises(PostTrainingError, match="they change each other by"):
        check_packing(model)
