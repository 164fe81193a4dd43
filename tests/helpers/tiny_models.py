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

_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    **{f"linear_num_{kind}_heads": 2 for kind in ("key", "value")},
    **{f"linear_{kind}_head_dim": 8 for kind in ("key", "value")},
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
          "num_attention_heads": 2, "patch_size": 4}  # fmt: skip
# {name in docs/guides/models.md: (model_type, settings)}.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Apertus": ("apertus", {}),
    "DeepSeek-V3": ("deepseek_v3", MIXTURES["deepseek_v3"]),
    "EuroLLM, Llama": ("llama", {}),
    "Falcon-H1": (
        "falcon_h1",
        {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_n_groups": 1, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
    ),
    "Gemma 2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, **_WINDOW}),
    "Gemma 3": ("gemma3", {"head_dim": 8, **_WINDOW}),
    "GLM-4.5": ("glm4_moe", {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                             "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
    "gpt-oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                            **_WINDOW}),
    "Granite": ("granite", {"logits_scaling": 4.0}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Mistral Small 3.1": ("mistral3", {"head_dim": 8}),
    "OLMo-3": ("olmo3", _WINDOW),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", MIXTURES["qwen3_moe"]),
    "Qwen3.5": ("qwen3_5_text", _LINEAR),
    "SmolLM3": ("smollm3", {}),
}  # fmt: skip
OF_IMAGES = {"gemma3": ("gemma3_text", {"mm_tokens_per_image": 4}), "mistral3": ("mistral", {})}


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


def make_family(name: str, base: Path, folder: Path) -> None:
    """Write a tiny model of a family into a copy of the folder `base`, in float32. Its weights are
    spread out, so that what one token sees of another shows."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    model_type, settings = FAMILIES[name]
    if model_type not in OF_IMAGES:
        made = make_model(model_type, base, folder, **settings, vocab_size=328)
    else:
        text_type, of_whole = OF_IMAGES[model_type]
        vision = {**_VISION, "head_dim": 8, "model_type": "pixtral"}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 328}
        text = {**TINY, **ids, **settings, "model_type": text_type}
        config = AutoConfig.for_model(
            model_type,
            text_config={key: value for key, value in text.items() if key != "architecture"},
            vision_config=vision if model_type == "mistral3" else _VISION,
            **of_whole,
        )
        shutil.copytree(base, folder)
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in made.parameters():
            if weights.dim() > 1:
                weights.mul_(4)
            else:
                weights.add_(0.1 * torch.rand(weights.shape, generator=generator))
    made.save_pretrained(folder)
    # By the class that transformers takes for the family, whatever the folder says.
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
