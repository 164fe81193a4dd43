"""The first tensor in which two safetensors files differ, and the first row in which two prepared
datasets do (`data/` of a run). Read without torch and numpy, since a login node has neither.

safetensors (https://huggingface.co/docs/safetensors): eight bytes, little-endian, with the length
of a JSON header {name: {"dtype", "shape", "data_offsets": [begin, end]}}; then the tensors' bytes.

A prepared dataset (data/prepared/dataset.py, data/pairs/dataset.py, data/indexed.py):

    row_offsets.npy  row_pieces.npy    row r is pieces[offsets[r] : offsets[r + 1]]; of each piece
                                       its sequence, first token, number of tokens
    tokens.idx  kinds.idx              where each sequence lies in tokens.bin and kinds.bin
    pairs.npy                          there for pairs alone, whose pieces are whole sequences
"""

import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_CHUNK_BYTES = 1 << 24
_TENSOR_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_INDEX_HEADER = struct.Struct("<9sQBQQ")
# As numpy.save writes it: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00.."
    rb"\{'descr': '<i8', 'fortran_order': False, 'shape': \([0-9, ]+\),? ?\} *\n",
    re.DOTALL,
)
_KINDS = ("prompt", "completion", "excluded")  # data/rows.py
_ROW_FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
_NEEDED = ("row_offsets.npy", "row_pieces.npy", "tokens.idx", "tokens.bin", "kinds.idx")


def first_tensor_difference(first: Path, second: Path) -> str | None:
    """The first difference, or None when names, dtypes, shapes and values are equal. It is such as
    "model.layers.3.mlp.down_proj.weight (first of 4 tensors): element 17 is 0.5, then 0.25".

    Layers come in the order of their numbers.

    Errors: ValueError, LookupError, struct.error for what are no tensors any more.
    """
    with open(first, "rb") as one, open(second, "rb") as other:
        ours, theirs = _Tensors.read(one), _Tensors.read(other)
        names = sorted(ours.described.keys() | theirs.described.keys(), key=natural_order)
        found = [text for name in names if (text := _tensor_difference(name, ours, theirs))]
    if not found:
        return None
    name, _, text = found[0].partition(": ")
    return f"{name} (first of {len(found)} tensors): {text}" if len(found) > 1 else found[0]


def first_row_difference(first: Path, second: Path) -> str | None:
    """The first difference, such as "row 12: token 5 is 17, then 99"; rows count from 0, as in
    training.

    None where the rows are the same, and where a folder has no rows of its own.
    Errors: OSError, ValueError, LookupError, struct.error for files that are damaged.
    """
    if not all((folder / name).exists() for folder in (first, second) for name in _NEEDED):
        return None
    with ExitStack() as stack:
        ours, theirs = (_Rows(folder, stack) for folder in (first, second))
        for row in range(min(len(ours), len(theirs))):
            if text := _row_difference(list(ours.parts(row)), list(theirs.parts(row))):
                return f"row {row}: {text}"
        if len(ours) != len(theirs):
            return f"{len(ours)} rows, then {len(theirs)}"
    return None


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


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


def _tensor_difference(name: str, ours: _Tensors, theirs: _Tensors) -> str | None:
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
    if dtype not in _TENSOR_FORMATS:
        return f"0x{data.hex()}"
    return repr(struct.unpack(_TENSOR_FORMATS[dtype], data)[0])


@dataclass(frozen=True)
class _Part:
    """One piece: its tokens and kinds, and a format that unpacks the tokens."""

    tokens: bytes
    kinds: bytes
    format: str


class _Rows:
    def __init__(self, folder: Path, stack: ExitStack):
        self._offsets = _read_npy(folder / "row_offsets.npy")
        self._pieces = _read_npy(folder / "row_pieces.npy")
        self._tokens = _Sequences(folder, "tokens", stack)
        self._kinds = _Sequences(folder, "kinds", stack)
        self._whole = (folder / "pairs.npy").exists()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def parts(self, row: int) -> Iterator[_Part]:
        for piece in range(self._offsets[row], self._offsets[row + 1]):
            sequence, start, length = self._pieces[3 * piece : 3 * piece + 3]
            where = (sequence, 0, None) if self._whole else (sequence, start, length)
            yield _Part(self._tokens.read(*where), self._kinds.read(*where), self._tokens.format)


class _Sequences:
    def __init__(self, folder: Path, name: str, stack: ExitStack):
        index = memoryview((folder / f"{name}.idx").read_bytes())
        _, _, code, num, _ = _INDEX_HEADER.unpack_from(index)
        begin = _INDEX_HEADER.size
        self.format = _ROW_FORMATS[code]
        self.item_bytes = struct.calcsize(self.format)
        self._lengths = _numbers(index[begin : begin + 4 * num], "i")
        self._places = _numbers(index[begin + 4 * num : begin + 12 * num], "q")
        self._file = stack.enter_context((folder / f"{name}.bin").open("rb"))

    def read(self, sequence: int, start: int, length: int | None) -> bytes:
        """length: None: to its end."""
        if length is None:
            length = self._lengths[sequence] - start
        self._file.seek(self._places[sequence] + start * self.item_bytes)
        return self._file.read(length * self.item_bytes)


def _read_npy(path: Path) -> memoryview:
    """The int64 values of a .npy file, in their order."""
    data = path.read_bytes()
    header = _NPY_HEADER.match(data)
    if not header:
        raise ValueError(f"not int64 in rows: {path}")
    return _numbers(memoryview(data)[header.end() :], "q")


def _numbers(data: bytes | memoryview, letter: str) -> memoryview:
    """Errors: ValueError, where `cast` would say that a type is wrong."""
    if len(data) % struct.calcsize(letter):
        raise ValueError("the last number is cut off")
    return memoryview(data).cast(letter)


def _row_difference(ours: list[_Part], theirs: list[_Part]) -> str | None:
    tokens = [b"".join(part.tokens for part in parts) for parts in (ours, theirs)]
    kinds = [b"".join(part.kinds for part in parts) for parts in (ours, theirs)]
    formats = {part.format for part in (*ours, *theirs)}
    if len(formats) != 1:
        return "tokens of another size"
    [letter] = formats
    if tokens[0] != tokens[1]:
        values = [_numbers(data, letter) for data in tokens]
        for index, (one, other) in enumerate(zip(*values, strict=False)):
            if one != other:
                return f"token {index} is {one}, then {other}"
        return f"{len(values[0])} tokens, then {len(values[1])}"
    if kinds[0] != kinds[1]:
        pairs = zip(*kinds, strict=True)
        index = next(i for i, (one, other) in enumerate(pairs) if one != other)
        one, other = (_KINDS[data[index]] for data in kinds)
        return f"the same tokens, and token {index} is {one}, then {other}"
    if [len(part.tokens) for part in ours] != [len(part.tokens) for part in theirs]:
        return "the same tokens, of other sequences"
    return None
