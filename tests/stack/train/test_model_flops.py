"""The count of FLOPs, against what torch counts while a model is differentiated."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig
from transformers import Qwen2Config as WindowedConfig

from post_training.train.throughput import half_precision_peak, model_flops, peak_flops_per_s

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
LENGTH = 48


def llama(**changes):
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SIZES, **changes}), attn_implementation="eager"
    )


def counted(model):
    """By torch, of one sequence, forward and backward; attention that is masked is counted too."""
    ids = torch.arange(LENGTH)[None] % SIZES["vocab_size"]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    return counter.get_total_flops()


def needed(model):
    """By us, with the masked half of attention added."""
    flops = model_flops(model)
    return flops.of_step(LENGTH, LENGTH, 2 * LENGTH**2)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 32}])
def test_flops_of_full_fine_tuning_are_those_torch_counts(changes):
    model = llama(**changes)
    # torch counts the products that make the rotary angles too: a thousandth here.
    assert counted(model) == pytest.approx(needed(model), rel=2e-3)


def test_flops_of_lora_are_those_torch_counts():
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(llama(), adapter)
    # Nothing below the first adapter needs a gradient: a matter of one layer in eight.
    assert counted(model) == pytest.approx(needed(model), rel=0.05)
    assert needed(model) < 0.75 * needed(llama())


def test_flops_of_llama_3_8b_are_six_times_its_matrices():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            )
        )
    flops = model_flops(model)
    of_embedding, of_norms = 128256 * 4096, 65 * 4096
    assert flops.body + flops.head == 6 * (8_030_261_248 - of_embedding - of_norms)
    assert flops.attention == 6 * 32 * 32 * 128


def test_flops_of_parameters_that_zero_3_has_taken_apart_are_the_same():
    model = llama()
    whole = model_flops(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert model_flops(model) == whole


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SIZES, num_local_experts=4),
        MistralConfig(**SIZES, sliding_window=16),
        WindowedConfig(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=4),
    ],
    ids=["experts", "window", "window in some layers"],
)
def test_flops_of_experts_or_windows_are_not_guessed(config):
    with torch.device("meta"):
        assert model_flops(AutoModelForCausalLM.from_config(config)) is None


def test_peak_of_a_cpu_is_not_known():
    assert peak_flops_per_s(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GH200 120GB", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_by_the_whole_name_of_the_device(name, peak):
    assert half_precision_peak(name) == peak
