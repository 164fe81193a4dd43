"""Writing a checkpoint for Megatron-LM to start from (--finetune, or a new run's --load).

    ROOT/latest_checkpointed_iteration.txt    `release`: weights, and no state of a training
    ROOT/release/                             in the format asked for: see megatron.py

A torch_dist folder is written tensor by tensor. A file of the format `torch` is all of a rank's
weights, which are in memory together: the model's size over the number of ranks.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from post_training.core.errors import UsageError
from post_training.core.files import write_json
from post_training.models.conversion.architectures import Shape
from post_training.models.conversion.megatron import (
    RANK_FILES,
    TRACKER,
    join_way,
    rank_folder,
)
from post_training.models.conversion.settings import as_namespace
from post_training.models.lazy_tensors import LazyTensor

RELEASE = "release"
# Checkpoints have been numbered since 2019; 3.0 is the layout of q, k and v that megatron.py tells.
_VERSION = 3.0
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
# Modules that ask for a state of FP8 when they are loaded; None is the one of a training without.
_WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_MAX_FILE_BYTES = 5 * 10**9


def write_dist(
    root: Path,
    tensors: dict[str, LazyTensor],
    arguments: dict[str, Any],
    shape: Shape,
    on_written: Callable[[int], None],
) -> None:
    """One folder for any number of ranks. Layers are one tensor with a dimension of its own, and
    experts another, as Megatron writes them where all layers are alike."""
    folder = root / RELEASE
    folder.mkdir(parents=True)
    states: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    out = _Chunks(folder)
    fused = arguments["transformer_impl"] == "transformer_engine"
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        key, leading, sizes = _dist_name(name, shape, fused)
        own = (1,) * len(leading) + tuple(tensor.shape)
        offsets = torch.Size(leading + (0,) * len(tensor.shape))
        value = tensor.read().reshape(own)
        stored[MetadataIndex(key, offsets)] = out.write(value)
        if key not in states:
            states[key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(sizes + tuple(tensor.shape)),
                [],
            )
        states[key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(own)))
        on_written(done)
    for key in _extra_states(tensors, shape, fused):
        states[key] = BytesStorageMetadata()
        stored[MetadataIndex(key)] = out.write([None])
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Metadata(state_dict_metadata=states, storage_data=stored), file)
    torch.save(_common(arguments), folder / "common.pt")
    described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(
        folder / "metadata.json",
        described | {"common_backend": "torch", "common_backend_version": 1},
    )
    (root / TRACKER).write_text(RELEASE)


class _Chunks:
    """Files __0_0.distcp, …: values one behind the other, as torch.save writes them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._number = 0
        self._end = 0

    def write(self, value: Any) -> _StorageInfo:
        if self._end > _MAX_FILE_BYTES:
            self._number, self._end = self._number + 1, 0
        name = f"__0_{self._number}.distcp"
        buffer = io.BytesIO()
        # A view would bring all that it is a view of.
        torch.save(value.clone() if isinstance(value, Tensor) else value, buffer)
        with open(self._folder / name, "ab") as file:
            size = file.write(buffer.getbuffer())
        start, self._end = self._end, self._end + size
        return _StorageInfo(name, start, size)


def _dist_name(
    name: str, shape: Shape, fused: bool
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(key, indices of the layer and the expert, numbers of layers and experts).

    fused: for layers of Transformer Engine. Megatron's local layers save the norm of a mixture by
    the fused name too (sharded_state_dict_keys_map of get_gpt_layer_local_spec); all else is alike.
    """
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name, (), ()
    rest, leading, sizes = layer[2], (int(layer[1]),), (shape.layers,)
    if expert := _EXPERT.fullmatch(rest):
        rest = f"mlp.experts.experts.{expert[2]}"
        leading, sizes = (*leading, int(expert[1])), (*sizes, shape.experts)
    rest = rest.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if not (shape.experts and fused):  # where it is a module of its own, before the experts
        rest = rest.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return f"decoder.layers.{rest}", leading, sizes


def _extra_states(tensors: dict[str, LazyTensor], shape: Shape, fused: bool) -> Iterator[str]:
    """Names as Megatron gives them: the place among all layers (and experts) and their number."""
    for name in tensors:
        layer = _LAYER.fullmatch(name)
        if layer is None or not name.endswith(
            tuple(f"{each}.weight" for each in _WITH_EXTRA_STATE)
        ):
            continue
        key, leading, sizes = _dist_name(name, shape, fused)
        place = f"{'.'.join(map(str, leading))}_{'.'.join(map(str, sizes))}"
        yield f"{key.removesuffix('weight')}_extra_state/shard_{place}"


def _common(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"args": as_namespace(arguments), "checkpoint_version": _VERSION, "iteration": 0}


def check_ranks(shape: Shape, tensor: int, pipeline: int, expert: int, vocabulary: int) -> None:
    """Errors: UsageError for a number of ranks over which this model can't be divided."""
    for what, number, by, key in (
        ("layers", shape.layers, pipeline, "pipeline_parallel_size"),
        ("query groups", shape.groups, tensor, "tensor_parallel_size"),
        ("rows of the embeddings", vocabulary, tensor, "tensor_parallel_size"),
        ("rows of the MLP", shape.intermediate, tensor, "tensor_parallel_size"),
        ("experts", shape.experts, expert, "expert_parallel_size"),
    ):
        if number % by or (not number and by > 1):
            raise UsageError(f"must divide the {number} {what} (got {by})", where=f"megatron.{key}")


def write_ranks(
    root: Path,
    tensors: dict[str, LazyTensor],
    arguments: dict[str, Any],
    shape: Shape,
    on_written: Callable[[int], None],
) -> None:
    """A file for each rank, of the numbers of ranks in `arguments`."""
    tensor_size = arguments["tensor_model_parallel_size"]
    pipeline_size = arguments["pipeline_model_parallel_size"]
    expert_size = arguments["expert_model_parallel_size"]
    fused = arguments["transformer_impl"] == "transformer_engine"
    done = 0
    for pipeline in range(pipeline_size):
        for expert in range(expert_size):
            for rank in range(tensor_size):
                weights: dict[str, Any] = {}
                for name, tensor in tensors.items():
                    own = _rank_name(
                        name, shape, pipeline, pipeline_size, expert, expert_size, fused
                    )
                    if own is None:
                        continue
                    part = _rank_part(name, tensor, rank, tensor_size, arguments["swiglu"])
                    weights[own] = part
                    if own.endswith(tuple(f"{each}.weight" for each in _WITH_EXTRA_STATE)):
                        weights[f"{own.removesuffix('weight')}_extra_state"] = None
                    done += 1
                    on_written(done)
                path = (
                    root / RELEASE / rank_folder(pipeline_size, expert_size, rank, pipeline, expert)
                )
                path.mkdir(parents=True)
                torch.save({**_common(arguments), "model": weights}, path / RANK_FILES[0])
    (root / TRACKER).write_text(RELEASE)


def _rank_name(
    name: str,
    shape: Shape,
    pipeline: int,
    pipeline_size: int,
    expert: int,
    expert_size: int,
    fused: bool,
) -> str | None:
    """The name of a tensor on this rank; None where the rank does not have it."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        first = name.startswith("embedding.")
        if first and shape.tied and pipeline_size > 1 and pipeline == pipeline_size - 1:
            return "output_layer.weight"  # the last stage's copy of the tied embeddings
        return name if pipeline == (0 if first else pipeline_size - 1) else None
    each = shape.layers // pipeline_size
    stage, number = divmod(int(layer[1]), each)
    if stage != pipeline:
        return None
    rest = layer[2]
    if found := _EXPERT.fullmatch(rest):
        rank, local = divmod(int(found[1]), shape.experts // expert_size)
        if rank != expert:
            return None
        rest = f"mlp.experts.local_experts.{local}.{found[2]}"
    if fused:
        rest = rest.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        if not shape.experts:
            rest = rest.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return f"decoder.layers.{number}.{rest}"


def _rank_part(name: str, tensor: LazyTensor, rank: int, size: int, is_gated: bool) -> Tensor:
    value = tensor.read()
    how = join_way(name, is_gated)
    if size == 1 or how == "copies":
        return value.clone()
    if how == "gated":
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return value.chunk(size, 1 if how == "rows" else 0)[rank].clone()
