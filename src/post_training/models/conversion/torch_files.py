"""Files that torch.save wrote, read without running anything in them.

A pickle is a program: the plain reader calls whatever function the file names. Here torch's
restricted reader (weights_only) is used, and what a checkpoint of Megatron or DeepSpeed names
besides tensors and plain values becomes an inert stand-in that holds its arguments. Anything else
that a file names is refused, with that name.
"""

import argparse
import pickle
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dist_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from post_training.core.errors import PostTrainingError, first_line

# Modules whose objects are in checkpoints: enums among the arguments, states of random generators,
# settings of a mixed precision. None of them is needed.
_KNOWN_MODULES = (
    "_codecs",
    "_io",
    "apex",
    "argparse",
    "collections",
    "datetime",
    "deepspeed",
    "enum",
    "megatron",
    "numpy",
    "pathlib",
    "transformer_engine",
    "types",
)
_CLASSES_OF_METADATA = (
    *(
        getattr(dist_metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    _StorageInfo,
    torch.Size,
    OrderedDict,
)
_PLANS = "torch.distributed.checkpoint."
_READABLE = {f"{each.__module__}.{each.__name__}": each for each in _CLASSES_OF_METADATA}
# A map of a file stays open with it; one conversion goes through the files in order.
_MOST_OPEN_FILES = 64


class StandIn:
    """In place of an object of a library: what it was made from, and nothing that runs."""

    def __init__(self, *arguments: Any, **named: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


@lru_cache(maxsize=_MOST_OPEN_FILES)
def read_torch(path: Path) -> dict[str, Any]:
    """The dict that torch.save wrote there; tensors are maps of the file, read where they are used.

    Errors: PostTrainingError where the file is missing, cut off, names what is not read, or holds
    anything else than a dict.
    """
    if not path.exists():
        raise PostTrainingError("the file is missing", where=str(path))
    try:
        found = _load(path)
    except (PostTrainingError, MemoryError):
        raise
    except Exception as error:  # Of bytes that are none of its, torch makes errors of any type.
        if isinstance(error, OSError) and error.filename:
            raise
        raise PostTrainingError(
            f"cut off, or not a file of PyTorch: {first_line(error)}",
            where=str(path),
            hint="copy it again, and compare the sizes",
        ) from None
    if not isinstance(found, dict):
        problem = f"holds a {type(found).__name__}, must be a dict, as of a checkpoint"
        raise PostTrainingError(problem, where=str(path))
    return found


def read_torch_stream(stream: BinaryIO) -> Any:
    """As read_torch, of what lies within another file. Errors: torch's own, of any type."""
    return torch.load(stream, map_location="cpu", weights_only=True)


def _load(path: Path) -> Any:
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    allowed: list[Any] = [argparse.Namespace]
    for name in named:
        if name.partition(".")[0] not in _KNOWN_MODULES:
            raise PostTrainingError(
                f"names {name}, which is neither a tensor nor a plain value: not read",
                where=str(path),
                hint="reading it could run code; where you trust the file, save its weights alone",
            )
        if name != "argparse.Namespace":
            allowed.append((StandIn, name))
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_dist_metadata(path: Path) -> dist_metadata.Metadata:
    """`.metadata` of a folder of torch.distributed.checkpoint: a pickle without tensors.

    Errors: PostTrainingError.
    """
    if not path.exists():
        raise PostTrainingError("the file is missing", where=str(path))
    try:
        with open(path, "rb") as file:
            found = _MetadataReader(file, path).load()
    except (PostTrainingError, OSError, MemoryError):
        raise
    except Exception as error:  # As above: bytes that are no pickle may be any of its commands.
        problem = f"cut off, or not a checkpoint of torch.distributed: {first_line(error)}"
        raise PostTrainingError(problem, where=str(path)) from None
    if not isinstance(found, dist_metadata.Metadata):
        raise PostTrainingError("not a checkpoint of torch.distributed", where=str(path))
    return found


def _member(kind: Any, name: str) -> Any:
    """Members of an enum are pickled as getattr(the enum, name); nothing else is looked up."""
    if kind is StandIn:
        return StandIn(name)
    if kind is not dist_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"looks up {name} of {kind}, which is not read")
    return kind[name]


class _MetadataReader(pickle.Unpickler):
    """Knows a few data classes of torch and no function that does anything."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _READABLE:
            return _READABLE[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full == "builtins.getattr":
            return _member
        if full == "torch.serialization._get_layout":
            return torch.serialization._get_layout
        # Megatron keeps the plan of its writing there, which nobody needs.
        if module.startswith(_PLANS) or module.partition(".")[0] in _KNOWN_MODULES:
            return StandIn
        raise PostTrainingError(
            f"names {full}, which is not read",
            where=str(self._path),
            hint="reading it could run code",
        )
