"""The weights of a model folder, tensor by tensor: read lazily, written one after another.

Written is what transformers writes: model.safetensors, or model-00001-of-0000N.safetensors and an
index. safetensors' own writer wants all tensors of a file in memory; this one wants one.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from post_training.core.errors import PostTrainingError
from post_training.core.files import read_json_object, write_json
from post_training.models.lazy_tensors import LazyTensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def open_weights(folder: Path, whole: str = WHOLE) -> dict[str, LazyTensor]:
    """{name: tensor} of a folder's safetensors files, in the order of their names.

    whole: the file where there is no index. Errors: PostTrainingError that names the file which is
    missing, cut off or of another content than the index says.
    """
    if (folder / whole).exists():
        files: dict[str, set[str] | None] = {whole: None}
    elif (folder / INDEX).exists():
        files = {}
        for name, file in read_index(folder).items():
            files.setdefault(file, set()).add(name)
    else:
        hint = None
        if found := sorted(folder.glob("*.bin")):
            hint = f"{found[0].name} is a pickle, and not read: save the model as safetensors"
        raise PostTrainingError(
            f"there is neither {whole} nor {INDEX}", where=str(folder), hint=hint
        )
    tensors: dict[str, LazyTensor] = {}
    for file, expected in files.items():
        path = folder / file
        if not path.exists():
            raise PostTrainingError("the file is missing", where=str(path))
        try:
            with safe_open(path, "pt") as weights:
                names = set(weights.keys())
                slices = {name: weights.get_slice(name) for name in names}
                found = {
                    name: LazyTensor(
                        tuple(each.get_shape()),
                        _dtype(each.get_dtype(), path, name),
                        partial(_read, path, name),
                    )
                    for name, each in slices.items()
                }
        except SafetensorError as error:
            problem = f"cut off, or no safetensors file: {error}"
            raise PostTrainingError(problem, where=str(path)) from None
        if expected is not None and expected != names:
            other = sorted(expected ^ names)[0]
            where = "only the index has it" if other in expected else "the index lacks it"
            raise PostTrainingError(f"{other}: {where}", where=str(path))
        tensors |= found
    return dict(sorted(tensors.items()))


def read_index(folder: Path) -> dict[str, str]:
    """{name of a weight: file of the folder}. Errors: PostTrainingError for an index that is none,
    or names files outside the folder."""
    path = folder / INDEX
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        problem = "must have a weight_map from names of weights to files"
        raise PostTrainingError(problem, where=str(path))
    for name in files.values():
        if Path(name).name != name or name in ("", ".."):
            raise PostTrainingError(
                f"names a file that is not in the folder: {name}", where=str(path)
            )
    return files


def _dtype(code: str, path: Path, name: str) -> torch.dtype:
    if code not in _DTYPES:
        raise PostTrainingError(
            f"{name} is {code}, must be one of {', '.join(_DTYPES)}", where=str(path)
        )
    return _DTYPES[code]


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as weights:
        return weights.get_tensor(name)


def write_weights(
    folder: Path,
    tensors: Sequence[tuple[str, LazyTensor]],
    max_file_bytes: int,
    on_written: Callable[[int], None] = lambda number: None,
) -> int:
    """Write the tensors in this order; the total size in bytes.

    max_file_bytes: of each file, but for one that a single tensor fills. on_written: told how many
    tensors are written.
    """
    files = _divide(tensors, max_file_bytes)
    weight_map: dict[str, str] = {}
    done = 0
    for number, part in enumerate(files, 1):
        name = WHOLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for _ in write_file(folder / name, part):
            done += 1
            on_written(done)
        weight_map |= dict.fromkeys((own for own, _ in part), name)
    total = sum(tensor.size_bytes for _, tensor in tensors)
    if len(files) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": total}}
        write_json(folder / INDEX, index | {"weight_map": dict(sorted(weight_map.items()))})
    return total


def _divide(
    tensors: Sequence[tuple[str, LazyTensor]], max_file_bytes: int
) -> list[list[tuple[str, LazyTensor]]]:
    files: list[list[tuple[str, LazyTensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if files[-1] and size + tensor.size_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append((name, tensor))
        size += tensor.size_bytes
    return files


def write_file(path: Path, tensors: Sequence[tuple[str, LazyTensor]]) -> Iterable[str]:
    """Write one safetensors file: 8 bytes of length, a JSON header, then the values. Yields each
    name once it is written, while its tensor is still in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size_bytes],
        }
        offset += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, lazy in tensors:
            tensor = lazy.read().contiguous()
            if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
                raise PostTrainingError(
                    f"{name} is {list(tensor.shape)} in {tensor.dtype}, was announced as "
                    f"{list(lazy.shape)} in {lazy.dtype}",
                    where=str(path),
                )
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            yield name
