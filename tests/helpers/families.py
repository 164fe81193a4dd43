"""A tiny model of each family of models that is tried, with random weights: FAMILIES.

Each has what is special in its family: experts, windows, layers that keep a state, chunks, scaled
logits. docs/guides/models.md has a row for each.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from helpers.sft_runs import TINY
from helpers.tiny_models import MIXTURES, make_model, spread_out

_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    **{f"linear_num_{kind}_heads": 2 for kind in ("key", "value")},
    **{f"linear_{kind}_head_dim": 8 for kind in ("key", "value")},
}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "first_k_dense_replace": 1}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
           "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
# Fewer heads would often give two tokens the same score of zero, and chance would decide.
_INDEX = {**_LATENT, **_ROUTED, "n_group": 2, "topk_group": 1, "index_topk": 8,
          "index_n_heads": 32, "index_head_dim": 16}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
          "mamba_expand": 2}  # fmt: skip
_PER_LAYER = {"vocab_size_per_layer_input": 328, "hidden_size_per_layer_input": 8,
              "num_kv_shared_layers": 0}  # fmt: skip
_NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("attention", "residual", "embedding")}

# {name in docs/guides/models.md: (model_type, settings)}: the families that are supported.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "Apertus": ("apertus", {}),
    "Apertus 1.5": ("apertus1p5", {}),
    "DeepSeek-V3": ("deepseek_v3", MIXTURES["deepseek_v3"]),
    "EuroLLM, Llama": ("llama", {}),
    "Falcon-H1": (
        "falcon_h1",
        {**_HEAD, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_n_groups": 1, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
    ),
    "Gemma 2": ("gemma2", {**_HEAD, "final_logit_softcapping": 2.0, **_WINDOW}),
    "Gemma 3": ("gemma3", {**_HEAD, **_WINDOW}),
    "GLM-4.5": ("glm4_moe", {**_HEAD, **_ROUTED}),
    "gpt-oss": ("gpt_oss", {**_HEAD, **_LOCAL_EXPERTS, **_WINDOW}),
    "Granite": ("granite", {"logits_scaling": 4.0}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Llama 4": (
        "llama4",
        {**_HEAD, "attention_chunk_size": 16, "num_local_experts": 4, "num_experts_per_tok": 1,
         "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0],
         "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "Mistral Small 3.1": ("mistral3", _HEAD),
    "OLMo-3": ("olmo3", _WINDOW),
    "Qwen3": ("qwen3", _HEAD),
    "Qwen3-MoE": ("qwen3_moe", MIXTURES["qwen3_moe"]),
    "Qwen3.5": ("qwen3_5", _LINEAR),
    "SmolLM3": ("smollm3", {}),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AFMoE (Trinity)": ("afmoe", {**_HEAD, **_EXPERTS, **_WINDOW, "num_dense_layers": 1}),
    "Arcee": ("arcee", _HEAD),
    "Bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", {"logit_scale": 0.25, **_WINDOW}),
    "DeepSeek-V3.2": ("deepseek_v32", _INDEX),
    "DeepSeek-V4": ("deepseek_v4", {**_HEAD, **_ROUTED}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2,
                                       "moe_intermediate_size": 32, "moe_layer_start_index": 1}),
    "EXAONE 4": ("exaone4", _WINDOW),
    "Falcon Mamba": ("falcon_mamba", {"state_size": 8}),
    "Gemma 3 (text)": ("gemma3_text", {**_HEAD, **_WINDOW}),
    "Gemma 3n (text)": ("gemma3n_text", {**_HEAD, **_WINDOW, **_PER_LAYER, "laurel_rank": 8,
                                         "activation_sparsity_pattern": [0.0, 0.0],
                                         "altup_num_inputs": 2}),
    "Gemma 4 (text)": ("gemma4_text", {**_HEAD, **_WINDOW, **_PER_LAYER, "global_head_dim": 8}),
    "GLM-4": ("glm4", _HEAD),
    "GLM-5": ("glm_moe_dsa", _INDEX),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                       "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}),
    "GPT-NeoX": ("gpt_neox", {}),
    "Granite 4 (hybrid)": ("granitemoehybrid", {**_MAMBA, **_LOCAL_EXPERTS, "logits_scaling": 4.0,
                                                "layer_types": ["mamba", "attention"],
                                                "shared_intermediate_size": 32}),
    "Granite MoE": ("granitemoe", {**_LOCAL_EXPERTS, "logits_scaling": 4.0}),
    "Helium": ("helium", _HEAD),
    "Hunyuan": ("hunyuan_v1_dense", _HEAD),
    "Hunyuan MoE": ("hunyuan_v1_moe", {**_HEAD, "num_experts": 4, "moe_topk": 2}),
    "Jamba": ("jamba", {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8,
                        "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 1,
                        "use_mamba_kernels": False}),
    "Kimi Linear": ("kimi_linear", {**_LATENT, **_LOCAL_EXPERTS, "q_lora_rank": None,
                                    "moe_intermediate_size": 32, "linear_head_dim": 8,
                                    "linear_num_heads": 4,
                                    "layer_types": ["linear_attention", "full_attention"]}),
    "LFM2-MoE": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], **_EXPERTS,
                              "num_dense_layers": 1}),
    "Mamba": ("mamba", {"state_size": 8}),
    "Mamba 2": ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}),
    "MiMo-V2-Flash": ("mimo_v2_flash", {**_HEAD, **_WINDOW, "v_head_dim": 8,
                                        "n_routed_experts": 4, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 32}),
    "MiniCPM3": ("minicpm3", _LATENT),
    "MiniMax": ("minimax", {**_LOCAL_EXPERTS, **_HEAD,
                            "layer_types": ["linear_attention", "full_attention"]}),
    "MiniMax-M2": ("minimax_m2", {**_LOCAL_EXPERTS, **_HEAD}),
    "Ministral": ("ministral", {**_HEAD, **_WINDOW}),
    "Ministral 3 (text)": ("ministral3", _HEAD),
    "Mistral with a window": ("mistral", {"sliding_window": 16}),
    "Mixtral": ("mixtral", _LOCAL_EXPERTS),
    "nanochat": ("nanochat", _HEAD),
    "Nemotron": ("nemotron", {}),
    "Nemotron-H": ("nemotron_h", {**_HEAD, "hybrid_override_pattern": "M*", "mamba_num_heads": 8,
                                  "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
                                  "use_mamba_kernels": False}),
    "OLMo-2": ("olmo2", {}),
    "OLMo hybrid": ("olmo_hybrid", _LINEAR),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Phi-3": ("phi3", {}),
    "Phi-3.5-MoE": ("phimoe", {**_LOCAL_EXPERTS, "router_jitter_noise": 0.0,
                               "input_jitter_noise": 0.0}),
    "Phi-4-mini (longrope)": (
        "phi3",
        {"original_max_position_embeddings": 96,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                             "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                             "original_max_position_embeddings": 96}},
    ),
    "Qwen2": ("qwen2", {}),
    "Qwen3-Next": ("qwen3_next", {**_LINEAR, **_SHARED_EXPERT}),
    "Qwen3.5 (text)": ("qwen3_5_text", _LINEAR),
    "Qwen3.5-MoE (text)": ("qwen3_5_moe_text", {**_LINEAR, **_SHARED_EXPERT}),
    "Seed-OSS": ("seed_oss", {**_HEAD, **_NO_DROPOUT}),
    "StableLM": ("stablelm", _NO_DROPOUT),
    "StarCoder2": ("starcoder2", {"sliding_window": 16, **_NO_DROPOUT}),
    "Zamba2": ("zamba2", {"mamba_d_state": 8, "mamba_ngroups": 1, "mamba_expand": 2,
                          "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 8,
                          "layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64,
                          "use_mamba_kernels": False}),
}  # fmt: skip
FAMILIES = {**SUPPORTED, **OTHERS}

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
          "num_attention_heads": 2, "patch_size": 4}  # fmt: skip
# Folders of more than text: {model_type: (that of its text, settings of the vision tower, others)}.
OF_IMAGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _TOWER, {"mm_tokens_per_image": 4}),
    "llama4": (
        "llama4_text",
        {**_TOWER, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        {},
    ),
    "mistral3": ("mistral", {**_TOWER, "head_dim": 8, "model_type": "pixtral"}, {}),
    "qwen3_5": (
        "qwen3_5_text",
        {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
         "out_hidden_size": 32, "patch_size": 4},
        {},
    ),
}  # fmt: skip
_NUM_IDS = 328  # the class of Qwen's tokenizer adds tokens of its own
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_family(name: str, base: Path, folder: Path) -> None:
    """Write a tiny model of a family into a copy of the folder `base`, in float32. Its weights are
    spread out (spread_out)."""
    from transformers import AutoTokenizer

    model_type, settings = FAMILIES[name]
    if model_type == "apertus1p5":
        made = make_model("apertus", base, folder, **settings, vocab_size=_NUM_IDS + 72)
    elif model_type in OF_IMAGES:
        made = make_whole(model_type, settings, base, folder)
    else:
        made = make_model(model_type, base, folder, **settings, vocab_size=_NUM_IDS)
    spread_out(made)
    made.save_pretrained(folder)
    if model_type == "apertus1p5":
        make_apertus_1p5(folder, num_outputs=_NUM_IDS)
    else:
        # By the class that transformers takes for the family, whatever the folder says.
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def make_whole(model_type: str, settings: dict[str, Any], base: Path, folder: Path) -> Any:
    """A model of OF_IMAGES, in float32; `folder` becomes a copy of `base`, yet without its weights.

    settings: of its language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text_type, vision, others = OF_IMAGES[model_type]
    text = {**TINY, **_IDS, "vocab_size": _NUM_IDS, **settings, "model_type": text_type}
    del text["architecture"]
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **others)
    shutil.copytree(base, folder)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def make_apertus_1p5(folder: Path, *, num_outputs: int) -> None:
    """Give the folder of a tiny Apertus the shape of Apertus 1.5, as far as it is public:
    transformers has no class for it yet. The ids from num_outputs on are those of images."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {
        re.sub(r"^model\.", "model.language_model.", name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    weights["lm_head.weight"] = weights["lm_head.weight"][:num_outputs].clone()
    weights["model.vision_tokenizer.conv.weight"] = torch.rand(3, 3, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    del text["architectures"]
    config = {
        "architectures": ["Apertus1p5ForConditionalGeneration"],
        "model_type": "apertus1p5",
        "text_config": {
            **text,
            "model_type": "apertus1p5_text",
            "output_vocab_size": num_outputs,
        },
        "dtype": text["dtype"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
