"""A checkpoint of GPT-NeoX (DeepSpeed), as Megatron's tensors (megatron.py) and settings.

    ROOT/latest                                    the name of the newest folder
    ROOT/global_step1000/
        layer_00-model_MM-model_states.pt          embeddings, of model-parallel rank MM
        layer_02-… to layer_{L+1}-…                the layers of the model
        layer_{L+3}-…  layer_{L+4}-…               the last norm; the output layer, if not tied
        mp_rank_00_model_states.pt                 counters, and a few of the settings
        configs/*.yml                              the settings of the training

    where pipe_parallel_size is 0: all tensors are in mp_rank_MM_model_states.pt, as sequential.N.…

What NeoX does otherwise than Megatron, and is changed here: a gated MLP has up before gate; grouped
queries have q, k and v of a rank one behind the other; norms are called scale.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from post_training.core import yaml
from post_training.core.errors import PostTrainingError
from post_training.models.conversion.architectures import Shape
from post_training.models.conversion.megatron import Checkpoint, check_alike
from post_training.models.conversion.settings import check_divides, check_sizes, finished
from post_training.models.conversion.torch_files import read_torch
from post_training.models.lazy_tensors import LazyTensor, concatenate, sum_of

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
# {name in NeoX: (name in Megatron, how the ranks' parts are joined)}
_NAMES = {
    "attention.query_key_value": ("self_attention.linear_qkv", "qkv"),
    "attention.dense": ("self_attention.linear_proj", "rows"),
    "mlp.linear1": ("mlp.linear_fc1", "fc1"),
    "mlp.linear2": ("mlp.linear_fc2", "rows"),
    "mlp.dense_h_to_4h": ("mlp.linear_fc1", "columns"),
    "mlp.dense_4h_to_h": ("mlp.linear_fc2", "rows"),
    "mlp.w1": ("mlp.linear_fc1", "gate"),
    "mlp.w3": ("mlp.linear_fc1", "up"),
    "mlp.w2": ("mlp.linear_fc2", "rows"),
    "input_layernorm": ("input_layernorm", "copies"),
    "post_attention_layernorm": ("pre_mlp_layernorm", "copies"),
}
_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
_ONLY: dict[str, tuple[Any, ...]] = {
    "pos_emb": ("rotary",),
    "gpt_j_tied": (None, False),
    "use_qk_layernorm": (None, False),
    "use_mup": (None, False),
    "moe_num_experts": (None, 1),
    "sliding_window_width": (None,),
    "output_layer_parallelism": (None, "column"),
    "soft_prompt_tuning": (None,),
}


def is_neox(folder: Path) -> bool:
    return any(
        _LAYER_FILE.fullmatch(path.name) or _RANK_FILE.fullmatch(path.name)
        for path in folder.glob("*_model_states.pt")
    ) or any(_LAYER_FILE.fullmatch(path.name) for path in folder.glob("layer_*.pt"))


def read_settings(folder: Path, files: list[Path]) -> dict[str, Any]:
    """Of the YAML files, or of those in the checkpoint; keys with `_` for `-`. Later files win.

    Errors: PostTrainingError where there are none, or sizes that no model has.
    """
    files = files or sorted((folder / "configs").glob("*.yml")) + sorted(
        (folder / "configs").glob("*.yaml")
    )
    if not files:
        raise PostTrainingError(
            "there are no settings in it (configs/*.yml)",
            where=str(folder),
            hint="name the YAML of the training: neox_configs: [FILE.yml]",
        )
    settings: dict[str, Any] = {}
    for file in files:
        document = yaml.load(file.read_bytes(), str(file))
        if not isinstance(document.data, dict):
            raise PostTrainingError("must be a mapping of settings", where=str(file))
        settings |= {str(key).replace("-", "_"): value for key, value in document.data.items()}
    where = str(folder)
    check_sizes(settings, _SIZES, ("num_kv_heads", "model_parallel_size"), where)
    heads, ranks = settings["num_attention_heads"], settings.get("model_parallel_size") or 1
    groups = settings.get("num_kv_heads") or heads
    check_divides("num_attention_heads", heads, "hidden_size", settings["hidden_size"], where)
    check_divides("num_kv_heads", groups, "num_attention_heads", heads, where)
    check_divides("model_parallel_size", ranks, "num_kv_heads", groups, where)
    return settings


def shape_of_tensors(tensors: dict[str, LazyTensor], settings: dict[str, Any], where: str) -> Shape:
    """The width of the MLP is that of the weights: NeoX rounds what the settings say.

    Errors: PostTrainingError that names a setting which transformers' models can't have.
    """
    for number in (1, 2):
        if (name := f"decoder.layers.0.mlp.linear_fc{number}.weight") not in tensors:
            raise PostTrainingError(f"{name} is missing", where=where)
    first = tensors["decoder.layers.0.mlp.linear_fc1.weight"].shape[0]
    width = tensors["decoder.layers.0.mlp.linear_fc2.weight"].shape[1]
    gated = first == 2 * width
    for name, allowed in _ONLY.items():
        value = settings.get(name)
        if value not in allowed:
            raise PostTrainingError(
                f"{name} is {value!r}, must be {allowed[-1]!r}: no model of Hugging Face has it",
                where=where,
            )
    norm = settings.get("norm", "layernorm").removeprefix("te_")
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    groups = settings.get("num_kv_heads") or heads
    if norm == "rmsnorm" and gated:
        family = "llama"
    elif norm == "layernorm" and not gated and groups == heads:
        family = "gpt_neox"
    else:
        raise PostTrainingError(
            f"norm is {norm}, the MLP {'gated' if gated else 'not gated'}, num_kv_heads {groups} "
            f"of {heads}: must be those of a Llama (rmsnorm, gated) or a GPT-NeoX (layernorm, not "
            "gated, all heads)",
            where=where,
        )
    percent = settings.get("rotary_pct", 1.0)
    if family == "llama" and percent != 1:
        raise PostTrainingError(f"rotary_pct is {percent}, must be 1 for a Llama", where=where)
    return Shape(
        family=family,
        hidden=hidden,
        intermediate=width,
        layers=settings["num_layers"],
        heads=heads,
        groups=groups,
        head_dim=hidden // heads,
        tied=not settings.get("no_weight_tying", False),
        biases=family == "llama" and bool(settings.get("use_bias_in_attn_linear", True)),
    )


def config_of_settings(
    shape: Shape, settings: dict[str, Any], where: str, vocabulary: int, dtype: torch.dtype
) -> PreTrainedConfig:
    """config.json of the model. Errors: PostTrainingError for an activation that it can't have."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(settings.get("rotary_emb_base", 10000)),
    }
    length = settings.get("max_position_embeddings") or settings.get("seq_length")
    if type(length) is not int or length < 1:
        problem = f"max_position_embeddings is {length!r}, must be an integer > 0"
        raise PostTrainingError(problem, where=where)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
    }
    activation = settings.get("activation", "gelu")
    if shape.family == "llama":
        if activation not in ("silu", "swiglu"):
            raise PostTrainingError(f"activation is {activation!r}, must be swiglu", where=where)
        common |= {
            "num_key_value_heads": shape.groups,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": settings.get("rms_norm_epsilon", 1e-8),
            "attention_bias": shape.biases,
        }
    else:
        # bias_gelu_fusion computes the approximation by tanh.
        fused = bool(settings.get("bias_gelu_fusion", False))
        if activation not in ("gelu", "relu"):
            raise PostTrainingError(f"activation is {activation!r}, must be gelu", where=where)
        rope["partial_rotary_factor"] = float(settings.get("rotary_pct", 1.0))
        common |= {
            "hidden_act": "gelu_pytorch_tanh" if fused and activation == "gelu" else activation,
            "layer_norm_eps": settings.get("layernorm_epsilon", 1e-5),
            "use_parallel_residual": bool(settings.get("gpt_j_residual", False)),
        }
    return finished(shape.family, common, dtype)


def read_neox(folder: Path, settings: dict[str, Any], merge_copies: Any) -> Checkpoint:
    """The tensors, joined over the model-parallel ranks. merge_copies: as of read_megatron.

    Errors: PostTrainingError that names a missing, short or foreign file or tensor.
    """
    files = _files(folder, settings)
    layers = settings["num_layers"]
    parts: dict[str, list[LazyTensor]] = {}
    for rank, by_layer in enumerate(files):
        for number, (path, prefix) in by_layer.items():
            for key, value in _content(path).items():
                if not key.startswith(prefix) or not isinstance(value, Tensor):
                    continue
                name = _name(key.removeprefix(prefix), number, layers, path)
                if name is None:
                    continue
                lazy = LazyTensor(
                    tuple(value.shape),
                    value.dtype,
                    lambda path=path, key=key: _content(path)[key],
                )
                own = parts.setdefault(name, [])
                if len(own) != rank:
                    raise PostTrainingError(f"{key} is not in every rank", where=str(path))
                own.append(lazy)
                check_alike(key, lazy, own[0], path)
    for name, own in parts.items():
        if len(own) != len(files):
            raise PostTrainingError(
                f"{name} is in {len(own)} of {len(files)} model-parallel ranks", where=str(folder)
            )
    return Checkpoint(folder, "GPT-NeoX", settings, _join(parts, settings, merge_copies, folder))


def _content(path: Path) -> dict[str, Any]:
    content = read_torch(path)
    within = content.get("module", content)
    if not isinstance(within, dict):
        problem = f"module is a {type(within).__name__}, must be a dict of weights"
        raise PostTrainingError(problem, where=str(path))
    return within


def _files(folder: Path, settings: dict[str, Any]) -> list[dict[int, tuple[Path, str]]]:
    """Of each model-parallel rank: {number of the layer's file: (file, beginning of its names)}."""
    found: dict[int, dict[int, tuple[Path, str]]] = {}
    for path in sorted(folder.glob("layer_*-model_states.pt")):
        if match := _LAYER_FILE.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = (path, "")
    last = settings["num_layers"] + (4 if settings.get("no_weight_tying", False) else 3)
    wanted = [0, *range(2, settings["num_layers"] + 2), settings["num_layers"] + 3]
    if last not in wanted:
        wanted.append(last)
    if not found:
        for path in sorted(folder.glob("mp_rank_*_model_states.pt")):
            if match := _RANK_FILE.fullmatch(path.name):
                found[int(match[1])] = {n: (path, f"sequential.{n}.") for n in wanted}
    ranks = settings.get("model_parallel_size") or 1
    for rank in range(ranks):
        for number in wanted:
            if number not in found.get(rank, {}):
                name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
                raise PostTrainingError("the file is missing", where=str(folder / name))
    if foreign := sorted(found.keys() - set(range(ranks))):
        path = next(iter(found[foreign[0]].values()))[0]
        raise PostTrainingError(
            f"a shard of another run: model_parallel_size is {ranks}", where=str(path)
        )
    for by_layer in found.values():
        if others := sorted(by_layer.keys() - set(wanted)):
            path = by_layer[others[0]][0]
            if read_torch(path):  # a layer without weights is an empty file
                raise PostTrainingError(
                    f"a shard of another run: there are {settings['num_layers']} layers",
                    where=str(path),
                )
    return [{number: found[rank][number] for number in wanted} for rank in range(ranks)]


def _name(key: str, number: int, layers: int, path: Path) -> str | None:
    """Megatron's name and, after a space, how the parts are joined; None for what is no weight.

    Errors: PostTrainingError, of the file, for what is not understood."""
    if number == 0:
        return (
            "embedding.word_embeddings.weight columns"
            if key == "word_embeddings.weight"
            else _odd(key, path)
        )
    if number == layers + 3:
        head, _, what = key.rpartition(".")
        if head == "norm":
            return f"decoder.final_layernorm.{_norm(what)} copies"
        return _odd(key, path)
    if number == layers + 4:
        return "output_layer.weight columns" if key == "final_linear.weight" else _odd(key, path)
    module, _, what = key.rpartition(".")
    if module not in _NAMES:
        return _odd(key, path)
    name, how = _NAMES[module]
    if how == "rows" and what == "bias":
        how = "row bias"
    return f"decoder.layers.{number - 2}.{name}.{_norm(what)} {how}"


def _norm(what: str) -> str:
    return {"scale": "weight", "offset": "bias"}.get(what, what)


def _odd(key: str, path: Path) -> str | None:
    """Buffers that NeoX computes anew; anything else is not understood, and told by its name."""
    if re.search(r"inv_freq|_extra_state|masked_bias|\.rotary_emb\.|attention\.bias$", key):
        return None
    raise PostTrainingError(f"{key} is no weight of a Llama or GPT-NeoX", where=str(path))


def _join(
    parts: dict[str, list[LazyTensor]], settings: dict[str, Any], merge_copies: Any, folder: Path
) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    gates: dict[str, list[LazyTensor]] = {}
    heads = settings["num_attention_heads"]
    groups = settings.get("num_kv_heads") or heads
    head_dim = settings["hidden_size"] // heads
    gated = _is_gated(settings)
    for named, own in parts.items():
        name, _, how = named.partition(" ")
        if how == "qkv" and sum(part.shape[0] for part in own) != (heads + 2 * groups) * head_dim:
            raise PostTrainingError(
                f"{name} has {sum(part.shape[0] for part in own):,} rows, must be "
                f"{(heads + 2 * groups) * head_dim:,} by the settings",
                where=str(folder),
            )
        if how == "qkv" and groups != heads:
            tensors[name] = concatenate(
                [_grouped(part, heads // len(own), groups // len(own), head_dim) for part in own], 0
            )
        elif how == "fc1" and gated:
            half = own[0].shape[0] // 2
            ups = [part.rows(0, half) for part in own]
            tensors[name] = concatenate([part.rows(half, 2 * half) for part in own] + ups, 0)
        elif how in ("gate", "up"):
            gates.setdefault(f"{name} {how}", []).append(concatenate(own, 0))
        elif how == "rows":
            tensors[name] = concatenate(own, 1)
        elif how == "row bias":
            # With the parallel residual each rank adds its bias before the sum over the ranks.
            tensors[name] = (
                sum_of(own) if settings.get("gpt_j_residual") else merge_copies(name, own)
            )
        elif how == "copies":
            tensors[name] = merge_copies(name, own)
        else:
            tensors[name] = concatenate(own, 0)
    for name in sorted({key.partition(" ")[0] for key in gates}):
        if missing := {f"{name} gate", f"{name} up"} - gates.keys():
            raise PostTrainingError(f"{missing.pop()} is missing", where=str(folder))
        tensors[name] = concatenate([gates[f"{name} gate"][0], gates[f"{name} up"][0]], 0)
    return tensors


def _is_gated(settings: dict[str, Any]) -> bool:
    return "glu" in settings.get("activation", "gelu") or settings.get("mlp_type") == "llama"


def _grouped(part: LazyTensor, heads: int, groups: int, head_dim: int) -> LazyTensor:
    """[q of all heads | k | v] of a rank -> of each group its queries, a key and a value."""
    rows = torch.arange(part.shape[0])
    q, k, v = rows.split([heads * head_dim, groups * head_dim, groups * head_dim])
    order = torch.cat(
        [
            q.reshape(groups, heads // groups, head_dim),
            k.reshape(groups, 1, head_dim),
            v.reshape(groups, 1, head_dim),
        ],
        dim=1,
    )
    return part.reorder_rows(order.flatten())
