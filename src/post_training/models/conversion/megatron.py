"""A checkpoint of Megatron-LM (megatron-core's names), in both of its formats, as whole tensors.

    ROOT/latest_checkpointed_iteration.txt    which of the folders beside it is the newest
    ROOT/iter_0001000/
        torch        mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt: what each rank had, in one file
        torch_dist   .metadata, common.pt, __R_N.distcp: see dist_folder.py

What comes out is the same for both and for any number of ranks: {name: LazyTensor}, with the number
of the layer counted over all pipeline stages, experts over all ranks, and these names:

    decoder.layers.N.{input_layernorm,pre_mlp_layernorm}.weight     also where they are fused
    decoder.layers.N.self_attention.linear_qkv.weight   [groups × (R + 2) × D, hidden]
    decoder.layers.N.mlp.linear_fc1.weight              gated: gate, then up
    decoder.layers.N.mlp.experts.E.linear_fc1.weight

R: query heads of a group; D: size of a head.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from post_training.core.errors import PostTrainingError
from post_training.core.files import read_json_object
from post_training.models.conversion.dist_folder import DistFolder
from post_training.models.conversion.settings import check_sizes
from post_training.models.conversion.torch_files import StandIn, read_torch
from post_training.models.lazy_tensors import LazyTensor, concatenate, sum_of

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
_RANK_FOLDER = re.compile(r"mp_rank_\d{2,}(_\d{3,}){0,2}")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LAYERS = "decoder.layers."
# Not weights: scales of FP8, a function of the settings, the optimizer's own.
_NO_WEIGHTS = re.compile(
    r"(^|\.)_extra_state(/|$)|rotary_pos_emb\.inv_freq$|^optimizer\.|^chained_"
)
_COLUMNS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
_FC1 = ("linear_fc1.weight", "linear_fc1.bias")
# Arguments that are numbers of something, where they are given.
_SIZES = ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "num_attention_heads",
          "num_query_groups", "kv_channels", "moe_router_topk", "tensor_model_parallel_size",
          "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
          "expert_model_parallel_size", "expert_tensor_parallel_size")  # fmt: skip
_ROWS = ("linear_proj.weight", "linear_fc2.weight")


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    settings: as Megatron names them (args). tensors: by the names above. left_out: {what: number}
    of what is in its files and no weight of the model. notes: lines for the person who watches."""

    folder: Path
    layout: str
    settings: dict[str, Any]
    tensors: dict[str, LazyTensor]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_megatron(folder: Path) -> bool:
    return (
        (folder / "metadata.json").exists()
        or (folder / "common.pt").exists()
        or any(
            _RANK_FOLDER.fullmatch(path.name) and any((path / name).exists() for name in RANK_FILES)
            for path in folder.glob("mp_rank_*")
        )
    )


def read_megatron(
    folder: Path, merge_copies: Callable[[str, list[LazyTensor]], LazyTensor]
) -> Checkpoint:
    """merge_copies: gives one tensor of the copies that the tensor-parallel ranks have of it.

    Errors: PostTrainingError that names a missing, short or foreign file or tensor.
    """
    if (folder / "common.pt").exists() or (folder / "metadata.json").exists():
        return _read_dist(folder)
    return _read_ranks(folder, merge_copies)


def _settings(found: Any, where: Path) -> dict[str, Any]:
    if isinstance(found, Namespace):
        found = vars(found)
    if not isinstance(found, dict) or "num_layers" not in found:
        raise PostTrainingError(
            "there are no training arguments (args) in it",
            where=str(where),
            hint="Megatron-LM's training saves them; other code on megatron-core may not",
        )
    # An enum is a stand-in made of its value.
    settings = {
        key: value.arguments[0] if isinstance(value, StandIn) and value.arguments else value
        for key, value in found.items()
    }
    check_sizes(settings, ("num_layers",), _SIZES, str(where))
    return settings


def _read_dist(folder: Path) -> Checkpoint:
    described = folder / "metadata.json"
    if described.exists():
        backend = read_json_object(described).get("sharded_backend")
        if backend != "torch_dist":
            raise PostTrainingError(
                f"the format is {backend!r}, must be 'torch_dist' or 'torch'",
                where=str(described),
                hint="save it once more by Megatron with --ckpt-format torch_dist",
            )
    if not (folder / "common.pt").exists():
        raise PostTrainingError("the file is missing", where=str(folder / "common.pt"))
    common = read_torch(folder / "common.pt")
    settings = _settings(common.get("args"), folder / "common.pt")
    stored = DistFolder(folder)
    tensors: dict[str, LazyTensor] = {}
    left_out: dict[str, int] = {}
    for name in sorted(stored.names):
        if _NO_WEIGHTS.search(name):
            left_out["optimizer and others"] = left_out.get("optimizer and others", 0) + 1
            continue
        for own, tensor in _parts(stored, name, settings["num_layers"]):
            if own in tensors:
                raise PostTrainingError(f"{own} is in it twice", where=str(folder / ".metadata"))
            tensors[own] = tensor
    return Checkpoint(folder, "torch_dist", settings, tensors, left_out)


def _parts(stored: DistFolder, name: str, num_layers: int) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) of each layer and expert in a tensor that Megatron keeps for all of them."""
    shape, _ = stored.names[name]
    prefixes: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    if name.startswith(_LAYERS) and not _LAYER.fullmatch(name):
        rest = name.removeprefix(_LAYERS)
        if len(shape) < 1 or shape[0] != num_layers:
            raise PostTrainingError(
                f"{name} is {list(shape)}: its first dimension must be the {num_layers} layers",
                where=str(stored.folder / ".metadata"),
            )
        prefixes = [(f"{_LAYERS}{layer}.{rest}", (layer,)) for layer in range(num_layers)]
    for own, leading in prefixes:
        head, found, tail = own.partition(".mlp.experts.experts.")
        if not found:
            yield _one_name(own), stored.tensor(name, leading)
            continue
        if re.match(r"\d+\.", tail):  # each expert under a name of its own
            yield _one_name(f"{head}.mlp.experts.{tail}"), stored.tensor(name, leading)
            continue
        for expert in range(shape[len(leading)]):
            expert_name = f"{head}.mlp.experts.{expert}.{tail}"
            yield _one_name(expert_name), stored.tensor(name, (*leading, expert))


def _one_name(name: str) -> str:
    """The name above, of those that Megatron's implementations of a layer have."""
    name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
    name = name.replace(".mlp.experts.local_experts.", ".mlp.experts.")
    return re.sub(
        r"\.mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r".mlp.experts.\3.\1.\2", name
    )


@dataclass(frozen=True)
class _Grid:
    """Numbers of ranks: tensor, pipeline, virtual stages of a rank, expert."""

    tensor: int
    pipeline: int
    virtual: int
    expert: int


def _read_ranks(
    folder: Path, merge_copies: Callable[[str, list[LazyTensor]], LazyTensor]
) -> Checkpoint:
    first = _rank_file(folder / sorted(path.name for path in folder.glob("mp_rank_*"))[0])
    content = read_torch(first)
    settings = _settings(content.get("args"), first)
    grid = _Grid(
        settings.get("tensor_model_parallel_size") or 1,
        settings.get("pipeline_model_parallel_size") or 1,
        settings.get("virtual_pipeline_model_parallel_size") or 1,
        settings.get("expert_model_parallel_size") or 1,
    )
    within = settings.get("expert_tensor_parallel_size") or grid.tensor
    if settings.get("num_experts") and within != grid.tensor:
        raise PostTrainingError(
            f"expert_tensor_parallel_size is {within}, must be {grid.tensor} as that of the rest",
            where=str(first),
            hint="save it once more by Megatron with --ckpt-format torch_dist",
        )
    _check_no_others(folder, grid)
    tensors: dict[str, LazyTensor] = {}
    next_layer = 0
    # A rank's virtual stages are not neighbours: stage 0 of every rank comes before stage 1 of any.
    for virtual in range(grid.virtual):
        key = "model" if grid.virtual == 1 else f"model{virtual}"
        for pipeline in range(grid.pipeline):
            for expert in range(grid.expert):
                ranks = [
                    _weights(folder, grid, key, tensor, pipeline, expert)
                    for tensor in range(grid.tensor)
                ]
                merged, num_layers = _merge(ranks, key, next_layer, expert, settings, merge_copies)
                tensors |= {
                    name: tensor
                    for name, tensor in merged.items()
                    if name not in tensors or ".mlp.experts." in name
                }
            next_layer += num_layers
    if next_layer != settings["num_layers"]:
        raise PostTrainingError(
            f"its ranks have {next_layer} layers, must be {settings['num_layers']} (num_layers)",
            where=str(folder),
        )
    held = sum(1 for key in ("optimizer", "opt_param_scheduler", "rng_state") if key in content)
    left_out = {"optimizer and others": held} if held else {}
    return Checkpoint(folder, "torch", settings, tensors, left_out)


def rank_folder(
    grid_pipeline: int, grid_expert: int, tensor: int, pipeline: int, expert: int
) -> str:
    """Megatron's name of a rank's folder: a part is left out where there is one such rank."""
    name = f"mp_rank_{tensor:02d}"
    if grid_pipeline > 1:
        name += f"_{pipeline:03d}"
    return f"{name}_{expert:03d}" if grid_expert > 1 else name


def _rank_file(folder: Path) -> Path:
    found = next((folder / name for name in RANK_FILES if (folder / name).exists()), None)
    if found is None:
        raise PostTrainingError("the file is missing", where=str(folder / RANK_FILES[0]))
    return found


def _check_no_others(folder: Path, grid: _Grid) -> None:
    expected = {
        rank_folder(grid.pipeline, grid.expert, tensor, pipeline, expert)
        for tensor in range(grid.tensor)
        for pipeline in range(grid.pipeline)
        for expert in range(grid.expert)
    }
    for path in sorted(folder.glob("mp_rank_*")):
        if path.name not in expected:
            raise PostTrainingError(
                f"a shard of another run: its arguments say {grid.tensor} tensor-parallel × "
                f"{grid.pipeline} pipeline × {grid.expert} expert ranks",
                where=str(path),
            )


def _weights(
    folder: Path, grid: _Grid, key: str, tensor: int, pipeline: int, expert: int
) -> tuple[Path, dict[str, Tensor]]:
    name = rank_folder(grid.pipeline, grid.expert, tensor, pipeline, expert)
    path = _rank_file(folder / name)
    content = read_torch(path)
    if not isinstance(content.get(key), dict):
        raise PostTrainingError(f"there is no {key!r} in it", where=str(path))
    found = {
        name: value
        for name, value in content[key].items()
        if isinstance(value, Tensor) and not _NO_WEIGHTS.search(name)
    }
    if "language_model" in content[key]:
        raise PostTrainingError(
            "it is of Megatron before megatron-core (language_model.encoder): not read",
            where=str(path),
            hint="load and save it by Megatron's tools/checkpoint/convert.py with --saver core",
        )
    return path, found


def _merge(
    ranks: list[tuple[Path, dict[str, Tensor]]],
    model_key: str,
    first_layer: int,
    expert_rank: int,
    settings: dict[str, Any],
    merge_copies: Callable[[str, list[LazyTensor]], LazyTensor],
) -> tuple[dict[str, LazyTensor], int]:
    """The tensors of one pipeline stage and one expert rank, and the number of its layers."""
    path, weights = ranks[0]
    experts_each = (settings.get("num_experts") or 0) // (
        settings.get("expert_model_parallel_size") or 1
    )
    for other_path, other in ranks[1:]:
        if missing := sorted(weights.keys() ^ other.keys()):
            raise PostTrainingError(
                f"{missing[0]} is in this file or in that of {path.parent.name}, and not in both",
                where=str(other_path),
            )
    merged: dict[str, LazyTensor] = {}
    layers = set()
    for name in weights:
        own = _one_name(name)
        if layer := _LAYER.fullmatch(own):
            layers.add(int(layer[1]))
            own = f"{_LAYERS}{int(layer[1]) + first_layer}.{layer[2]}"
        own = re.sub(
            r"(?<=\.mlp\.experts\.)\d+",
            lambda found: str(int(found[0]) + expert_rank * experts_each),
            own,
        )
        if ".mlp.experts.weight" in own:
            raise PostTrainingError(
                f"{name}: the experts of a rank are one tensor (moe_grouped_gemm without "
                "Transformer Engine): not read",
                where=str(path),
                hint="save it once more by Megatron with --ckpt-format torch_dist",
            )
        parts = [_in_file(file, model_key, name) for file, _ in ranks]
        for (other_path, _), part in zip(ranks[1:], parts[1:], strict=True):
            check_alike(name, part, parts[0], other_path)
        how = join_way(own, bool(settings.get("swiglu")))
        if how == "gated":
            halves = [part.shape[0] // 2 for part in parts]
            gates = [part.rows(0, half) for part, half in zip(parts, halves, strict=True)]
            ups = [part.rows(half, 2 * half) for part, half in zip(parts, halves, strict=True)]
            merged[own] = concatenate([*gates, *ups], 0)
        elif how == "copies":
            merged[own] = merge_copies(own, parts)
        else:
            merged[own] = concatenate(parts, 1 if how == "rows" else 0)
    if layers != set(range(len(layers))):
        raise PostTrainingError(
            f"its layers are {sorted(layers)}, must be numbered from 0 without gaps",
            where=str(path),
        )
    return merged, len(layers)


def check_alike(name: str, part: LazyTensor, first: LazyTensor, path: Path) -> None:
    """Tensor-parallel ranks have parts of one size and dtype. first: that of rank 0.

    Errors: PostTrainingError for a part, in the file `path`, that is another.
    """
    if (part.shape, part.dtype) != (first.shape, first.dtype):
        raise PostTrainingError(
            f"{name} is {list(part.shape)} in {part.dtype}, must be {list(first.shape)} in "
            f"{first.dtype} as that of the first tensor-parallel rank",
            where=str(path),
        )


def join_way(name: str, is_gated: bool) -> Literal["columns", "rows", "gated", "copies"]:
    """How tensor-parallel ranks share a tensor. columns: along dimension 0; rows: along 1; gated:
    along 0, of each half by itself; copies: each rank has all of it."""
    if name.endswith(_FC1):
        return "gated" if is_gated else "columns"
    if name.endswith(_COLUMNS):
        return "columns"
    return "rows" if name.endswith(_ROWS) else "copies"


def _in_file(path: Path, key: str, name: str) -> LazyTensor:
    tensor = read_torch(path)[key][name]
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: read_torch(path)[key][name])


def one_of_copies(
    name: str, copies: list[LazyTensor], *, average: bool, notes: list[str]
) -> LazyTensor:
    """What each tensor-parallel rank keeps for itself, a norm above all: one where all are equal.

    average: where they are not, their mean; else that is an error.
    Errors: PostTrainingError that names the tensor and the largest difference.
    """
    first = copies[0].read()
    differ = [copy for copy in copies[1:] if not torch.equal(first, copy.read())]
    if not differ:
        return copies[0]
    largest = max((first.double() - copy.read().double()).abs().max().item() for copy in differ)
    if not average:
        raise PostTrainingError(
            f"{name}: the tensor-parallel ranks have {len(copies)} copies of it, which differ by "
            f"up to {largest:.3g}",
            hint="`differing_copies: average` takes their mean",
        )
    notes.append(f"{name}: mean of {len(copies)} copies, which differ by up to {largest:.3g}")
    return sum_of(copies, len(copies))
