"""The settings of a model: as Megatron's arguments, and as Hugging Face's config.json.

A setting that changes what the model computes and that Hugging Face's model can't have is refused
by its name; one that only says how it was trained is not looked at.
"""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from post_training.core.errors import PostTrainingError
from post_training.models.conversion.architectures import Family, Shape

# {argument: the values with which a model of Hugging Face is the same}; None where it is absent.
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "multi_latent_attention": (None, False),
    "mtp_num_layers": (None, 0),
    "qk_l2_norm": (None, False),
    "attention_output_gate": (None, False),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "rotary_seq_len_interpolation_factor": (None,),
    "glu_linear_offset": (None, 0, 0.0),
    "activation_func_clamp_value": (None,),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "xiprelu": (None, False),
    "xiprelup": (None, False),
    "post_layer_norm": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "use_mup": (None, False),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_layer_freq": (None, 1),
    "moe_router_pre_softmax": (None, False),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "moe_router_num_groups": (None, 1),
    "softmax_type": (None, "vanilla"),
    "moe_router_topk_scaling_factor": (None, 1, 1.0),
    "heterogeneous_layers_config_path": (None,),
}
# Megatron's scaling of rotary embeddings: these three are constants in its code.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_HIDDEN_ACT = {"llama": "silu", "mixtral": "silu", "apertus": "xielu"}
_DEFAULT_HEAD_DIM = ("llama", "mixtral")  # whose config.json can name it
_BIAS = "attention_bias"


def check_sizes(
    settings: dict[str, Any], required: Iterable[str], others: Iterable[str], where: str
) -> None:
    """Errors: PostTrainingError for one of `required` that is not there, and for any of both that
    is given and no integer > 0."""
    for name in required:
        _required(settings, name, where)
    for name in (*required, *others):
        value = settings.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise PostTrainingError(f"{name} is {value!r}, must be an integer > 0", where=where)


def check_divides(name: str, number: int, of_name: str, whole: int, where: str) -> None:
    """Errors: PostTrainingError where `number` of one setting does not divide that of another."""
    if whole % number:
        raise PostTrainingError(
            f"{name} is {number}, must divide {of_name}, which is {whole}", where=where
        )


def shape_of_arguments(args: dict[str, Any], where: str) -> Shape:
    """Errors: PostTrainingError that names the first argument that has no counterpart."""
    for name, allowed in _ONLY.items():
        value = args.get(name)
        if value not in allowed and not (value is None and name == "normalization"):
            expected = " or ".join(repr(each) for each in allowed)
            raise PostTrainingError(
                f"{name} is {value!r}, must be {expected}: no model of Hugging Face has it",
                where=where,
            )
    experts = args.get("num_experts") or 0
    family = _family(args, experts, where)
    heads = _required(args, "num_attention_heads", where)
    hidden = _required(args, "hidden_size", where)
    groups = args.get("num_query_groups") or heads
    # Megatron's default of num_query_groups is 1, also where queries are in no groups.
    if not args.get("group_query_attention", True):
        groups = heads
    check_divides("num_query_groups", groups, "num_attention_heads", heads, where)
    head_dim = args.get("kv_channels") or hidden // heads
    if family == "apertus" and head_dim * heads != hidden:
        raise PostTrainingError(
            f"kv_channels is {head_dim}, must be {hidden // heads}: Apertus has no other",
            where=where,
        )
    if args.get("rotary_percent") not in (None, 1, 1.0):
        raise PostTrainingError(
            f"rotary_percent is {args['rotary_percent']}, must be 1: {family} rotates whole heads",
            where=where,
        )
    return Shape(
        family=family,
        hidden=hidden,
        intermediate=args.get("moe_ffn_hidden_size")
        if experts and args.get("moe_ffn_hidden_size")
        else _required(args, "ffn_hidden_size", where),
        layers=_required(args, "num_layers", where),
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        tied=not args.get("untie_embeddings_and_output_weights", False),
        experts=experts,
        biases=_has_biases(args, family, where),
        rope_interleaved=bool(args.get("rotary_interleaved")),
    )


def _family(args: dict[str, Any], experts: int, where: str) -> Family:
    gated, xielu = bool(args.get("swiglu")), bool(args.get("xielu"))
    if xielu and not experts and not gated:
        if not args.get("qk_layernorm"):
            raise PostTrainingError("qk_layernorm is off, must be on: Apertus has it", where=where)
        return "apertus"
    if gated and not xielu:
        if args.get("qk_layernorm"):
            raise PostTrainingError(
                "qk_layernorm is on, must be off: a Llama or Mixtral has none", where=where
            )
        return "mixtral" if experts else "llama"
    raise PostTrainingError(
        f"swiglu is {gated}, xielu {xielu}, num_experts {experts}: must be those of a Llama "
        "(swiglu), an Apertus (xielu) or a Mixtral (swiglu and experts)",
        where=where,
    )


def _has_biases(args: dict[str, Any], family: Family, where: str) -> bool:
    linear, fused = bool(args.get("add_bias_linear")), bool(args.get("add_qkv_bias"))
    if linear or fused:
        name = "add_bias_linear" if linear else "add_qkv_bias"
        raise PostTrainingError(f"{name} is on, must be off for a {family}", where=where)
    return False


def _required(args: dict[str, Any], name: str, where: str) -> Any:
    if args.get(name) is None:
        raise PostTrainingError(f"its settings lack {name}", where=where)
    return args[name]


def config_of_arguments(
    shape: Shape, args: dict[str, Any], vocabulary: int, dtype: torch.dtype
) -> PreTrainedConfig:
    """config.json of the model, all but what the tokenizer decides (its special tokens)."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(args.get("rotary_base") or 10000),
    }
    factor = args.get("rope_scaling_factor") or 8.0
    if args.get("use_rope_scaling") and factor != 1:
        rope |= {"rope_type": "llama3", "factor": float(factor), **_LLAMA3}
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "hidden_act": _HIDDEN_ACT[shape.family],
        "max_position_embeddings": args.get("max_position_embeddings")
        or args.get("seq_length")
        or 2048,
        "rms_norm_eps": args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": shape.tied,
    }
    if shape.family != "mixtral":
        settings |= {_BIAS: shape.biases}
    if shape.family in _DEFAULT_HEAD_DIM:
        settings["head_dim"] = shape.head_dim
    if shape.family == "mixtral":
        settings |= {
            "num_local_experts": shape.experts,
            "num_experts_per_tok": args.get("moe_router_topk") or 2,
            "router_aux_loss_coef": args.get("moe_aux_loss_coeff") or 0.0,
        }
    return finished(shape.family, settings, dtype)


def finished(family: str, settings: dict[str, Any], dtype: torch.dtype) -> PreTrainedConfig:
    """With the name of its class, by which transformers finds it, and the dtype of its weights."""
    names = {
        "llama": "LlamaForCausalLM",
        "apertus": "ApertusForCausalLM",
        "mixtral": "MixtralForCausalLM",
        "gpt_neox": "GPTNeoXForCausalLM",
    }
    config = AutoConfig.for_model(family, **settings)
    config.architectures = [names[family]]
    config.dtype = dtype
    return config


def shape_of_config(config: PreTrainedConfig, where: str) -> Shape:
    """Of a folder of Hugging Face's. Errors: PostTrainingError for a family that is not converted,
    or one of its settings that Megatron can't have."""
    family = config.model_type
    if family not in _HIDDEN_ACT:
        raise PostTrainingError(
            f"models of the type {family} are not converted to Megatron (there are "
            f"{', '.join(_HIDDEN_ACT)})",
            where=where,
        )
    only = {
        "hidden_act": (_HIDDEN_ACT[family],),
        "sliding_window": (None,),
        _BIAS: (False,),
        "mlp_bias": (False,),
    }
    for name, allowed in only.items():
        if hasattr(config, name) and getattr(config, name) not in allowed:
            raise PostTrainingError(
                f"{name} is {getattr(config, name)!r}, must be {allowed[0]!r} for Megatron",
                where=where,
            )
    return Shape(
        family=family,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        tied=config.tie_word_embeddings,
        experts=getattr(config, "num_local_experts", 0) or 0,
    )


def arguments_of_config(config: PreTrainedConfig, shape: Shape, where: str) -> dict[str, Any]:
    """Megatron's arguments that say what the model is (those of --use-checkpoint-args)."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "llama3":
        for name, value in _LLAMA3.items():
            if rope[name] != value:
                raise PostTrainingError(
                    f"rope_parameters.{name} is {rope[name]}, must be {value}: in Megatron it is "
                    "a constant",
                    where=where,
                )
    elif kind != "default":
        raise PostTrainingError(
            f"rope_type is {kind!r}, must be 'default' or 'llama3' for Megatron", where=where
        )
    base = int(rope["rope_theta"])
    if base != rope["rope_theta"]:
        raise PostTrainingError(
            f"rope_theta is {rope['rope_theta']}, must be an integer", where=where
        )
    arguments = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "group_query_attention": shape.groups != shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": rope.get("factor", 1.0),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "swiglu": shape.family != "apertus",
        "xielu": shape.family == "apertus",
        "qk_layernorm": shape.family == "apertus",
        "untie_embeddings_and_output_weights": not shape.tied,
        "num_experts": shape.experts or None,
    }
    if shape.experts:
        arguments |= {
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": shape.intermediate,
            "moe_aux_loss_coeff": config.router_aux_loss_coef,
        }
    return arguments


def as_namespace(arguments: dict[str, Any]) -> Namespace:
    """As Megatron saves them."""
    return Namespace(**arguments)
