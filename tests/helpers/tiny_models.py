"""Tiny models of any architecture that transformers knows, with random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.sft_runs import TINY

_SHAPE = {name: value for name, value in TINY.items() if name != "architecture"}
_IDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}

# {model_type: settings} of mixtures of experts, whose weights have other names in files than in
# memory.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_LATENT,
        "qk_nope_head_dim": 8,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def make_model(model_type: str, base: Path, folder: Path, **settings: Any) -> Any:
    """Write a model into a copy of the folder `base`, whose tokenizer it has; the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder)
    of_base = json.loads((base / "config.json").read_text())
    ids = {name: of_base[name] for name in _IDS}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **ids, **settings})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    return made


def spread_out(model: Any, seed: int = 0) -> None:
    """Make its random matrices larger, so that what one token sees of another shows, and its norms
    unlike one another, so that none can be taken for another."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(4)
            else:
                weights.add_(0.1 * torch.rand(weights.shape, generator=generator))
