"""The first tensor in which two safetensors files differ.

The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, with the length of
a JSON header {name: {"dtype", "shape", "data_offsets": [begin, end]}}; then the tensors' bytes.
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_CHUNK_BYTES = 1 << 24
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True)
class _Tensors:
    file: IO[bytes]
    start: int
    described: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: IO[bytes]) -> "_Tensors":
        (length,) = struct.unpack("<Q", file.read(8))
        # Of other bytes the length is any number, and reading so much would take all the memory.
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is longer than the file")
        described = json.loads(file.read(length))
        described.pop("__metadata__", None)
        return cls(file, 8 + length, described)


def first_tensor_difference(first: Path, second: Path) -> str | None:
    """Such as "model.layers.3.mlp.down_proj.weight (first of 4 tensors): element 17 is 0.5, then
    0.25"; None when tensors, names, dtypes and shapes are equal. Layers come in their order.

    Errors: ValueError, LookupError, struct.error for what are no tensors any more.
    """
    with open(first, "rb") as one, open(second, "rb") as other:
        ours, theirs = _Tensors.read(one), _Tensors.read(other)
        names = sorted(ours.described.keys() | theirs.described.keys(), key=natural_order)
        found = [text for name in names if (text := _difference(name, ours, theirs))]
    if not found:
        return None
    name, _, text = found[0].partition(": ")
    return f"{name} (first of {len(found)} tensors): {text}" if len(found) > 1 else found[0]


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _difference(name: str, ours: _Tensors, theirs: _Tensors) -> str | None:
    one, other = ours.described.get(name), theirs.described.get(name)
    if one is None or other is None:
        there, then = ("absent", "there") if one is None else ("there", "absent")
        return f"{name}: is {there}, then {then}"
    for key in ("dtype", "shape"):
        if one[key] != other[key]:
            return f"{name}: {key} is {one[key]}, then {other[key]}"
    begin, end = one["data_offsets"]
    offset = _first_different_byte(ours, begin, theirs, other["data_offsets"][0], end - begin)
    if offset is None:
        return None
    return f"{name}: {_element(one, ours, theirs, other, offset)}"


def _first_different_byte(
    ours: _Tensors, our_begin: int, theirs: _Tensors, their_begin: int, size: int
) -> int | None:
    ours.file.seek(ours.start + our_begin)
    theirs.file.seek(theirs.start + their_begin)
    for done in range(0, size, _CHUNK_BYTES):
        one = ours.file.read(min(_CHUNK_BYTES, size - done))
        other = theirs.file.read(len(one))
        if one != other:
            return done + next(index for index, byte in enumerate(one) if byte != other[index])
    return None


def _element(
    one: dict[str, Any], ours: _Tensors, theirs: _Tensors, other: dict[str, Any], offset: int
) -> str:
    begin, end = one["data_offsets"]
    count = 1
    for length in one["shape"]:
        count *= length
    width = (end - begin) // count
    index = offset // width
    values = []
    for tensors, described in ((ours, one), (theirs, other)):
        tensors.file.seek(tensors.start + described["data_offsets"][0] + index * width)
        values.append(_value(tensors.file.read(width), one["dtype"]))
    return f"element {index} is {values[0]}, then {values[1]}"


def _value(data: bytes, dtype: str) -> str:
    if dtype == "BF16":
        data, dtype = b"\0\0" + data, "F32"  # the upper half of a float32
    if dtype not in _FORMATS:
        return f"0x{data.hex()}"
    return repr(struct.unpack(_FORMATS[dtype], data)[0])
