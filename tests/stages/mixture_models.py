"""Tiny models whose weights have other names in files than in memory."""

import shutil
from pathlib import Path
from typing import Any

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}

# {model_type: settings}
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


def make_mixture(family: str, base: Path, folder: Path) -> Path:
    """A model with random weights and the tokenizer of `base`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {**_SHAPE, "vocab_size": len(tokenizer), **MIXTURES[family]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **settings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    for file in base.glob("*.jinja"):
        shutil.copy(file, folder)
    return folder
