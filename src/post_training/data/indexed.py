"""Megatron's indexed datasets: PREFIX.bin, the tokens one after another, and PREFIX.idx:

    offset     bytes  content, little-endian
    0          9      MMIDIDX and two zero bytes
    9          8      u64 version, 1
    17         1      u8 code of the tokens' dtype
    18         8      u64 N, the number of sequences
    26         8      u64 M, the number of documents + 1
    34         4 N    i32 length of each sequence, in tokens
    34 + 4 N   8 N    i64 offset of each sequence in .bin, in bytes
    34 + 12 N  8 M    i64 first sequence of each document; then N

A pair is checked as a whole when it is opened. Memory: 12 bytes a sequence and 8 a document,
whatever the number of tokens. When a pair is written, both files are written beside their places
and renamed when they are complete: .bin, then .idx.

Ours come in twos: NAME_text_document holds the tokens and NAME_kinds_document, sequence by
sequence, what the loss makes of each (rows.py); so no mask is ever inferred from the tokens.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int32, Int64, Integer

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_file

DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M
TEXT, INDEXED_KINDS = "_text_document", "_kinds_document"
_LEGACY_MAGIC = b"TNTIDX"


def index_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.idx")  # with_suffix would take a dot of the name


def data_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bin")


def offsets_of(lengths: Integer[np.ndarray, " S"], dtype: np.dtype) -> Int64[np.ndarray, " bounds"]:
    """Bytes before each sequence, and after the last."""
    offsets = np.zeros(len(lengths) + 1, "<i8")
    np.cumsum(lengths, out=offsets[1:])
    offsets *= dtype.itemsize
    return offsets


class IndexedDataset:
    """The sequences of a pair, read from the disk when they are asked for.

    lengths: int32 [S], in tokens. documents: int64, first sequence of each document; then S.

    Read by pread, not mapped: a mapping counts every page that was ever touched as memory of the
    process, and kills it when the file gets shorter. There is no file position to share, so
    threads and forked processes may read; a pickled dataset opens and checks its files again.
    Errors: PostTrainingError when the files aren't a pair, complete and consistent.
    """

    def __init__(self, prefix: Path):
        self.prefix = Path(prefix)
        self.dtype, self.lengths, self.documents = _read_index(index_path(self.prefix))
        self._offsets = offsets_of(self.lengths, self.dtype)
        self._data_path = data_path(self.prefix)
        if not self._data_path.is_file():
            raise PostTrainingError("no such file beside its .idx", where=str(self._data_path))
        self._data = open(self._data_path, "rb", buffering=0)  # noqa: SIM115 (kept open)
        found, expected = os.fstat(self._data.fileno()).st_size, int(self._offsets[-1])
        if found != expected:
            raise PostTrainingError(
                f"{found:,} bytes, must be {expected:,}: {self.num_tokens:,} tokens of "
                f"{self.dtype.itemsize} bytes, as {self.prefix.name}.idx says",
                where=str(self._data_path),
                hint="the file is cut short, or its .idx is of another one: write both again",
            )

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1]) // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def read(
        self, index: int, start: int = 0, length: int | None = None
    ) -> Integer[np.ndarray, " T"]:
        """Tokens of a sequence: all, or `length` of them from `start`."""
        size = int(self.lengths[index])
        end = size if length is None else start + length
        if not 0 <= start <= end <= size:
            raise IndexError(f"tokens {start} to {end} of {size} in sequence {index}")
        first = self.token_offset(index)
        return self._read(first + start, first + end)

    def token_offset(self, index: int) -> int:
        """Tokens before the sequence, in all sequences before it."""
        if not 0 <= index <= len(self):
            raise IndexError(f"index {index} is out of bounds, there are {len(self)} sequences")
        return int(self._offsets[index]) // self.dtype.itemsize

    def read_many(self, indices: Sequence[int]) -> list[Integer[np.ndarray, " _"]]:
        """The tokens of each of these sequences; neighbours are read in one go."""
        sequences: list[np.ndarray] = []
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for run in np.split(np.asarray(indices, np.int64), breaks):
            if len(run):
                ends = self.token_offset(int(run[0])), self.token_offset(int(run[-1]) + 1)
                tokens = self._read(*ends)
                sequences += np.split(tokens, np.cumsum(self.lengths[run[:-1]], dtype=np.int64))
        return sequences

    def _read(self, start: int, end: int) -> Integer[np.ndarray, " T"]:
        """The tokens from `start` to before `end`, counted through all sequences."""
        tokens = np.empty(end - start, self.dtype)
        offset = start * self.dtype.itemsize
        view = memoryview(tokens.view(np.uint8))
        while view:
            # Linux gives at most 2 GiB at once.
            num_read = os.preadv(self._data.fileno(), [view], offset)
            if num_read == 0:
                problem = f"ends at byte {offset:,}; it was longer when it was opened"
                raise PostTrainingError(problem, where=str(self._data_path))
            view, offset = view[num_read:], offset + num_read
        return tokens

    def __getstate__(self) -> Path:
        return self.prefix

    def __setstate__(self, prefix: Path) -> None:
        self.__init__(prefix)


def open_kinds(prefix: Path, tokens: IndexedDataset) -> IndexedDataset:
    """The kinds of these tokens. Errors: PostTrainingError when they are of other sequences."""
    kinds = IndexedDataset(prefix)
    if kinds.dtype != np.uint8:
        raise PostTrainingError(f"kinds are uint8, not {kinds.dtype}", where=str(prefix))
    if not np.array_equal(kinds.lengths, tokens.lengths):
        raise PostTrainingError(
            f"its sequences are not as long as those of {tokens.prefix.name}", where=str(prefix)
        )
    return kinds


def _read_index(
    path: Path,
) -> tuple[np.dtype, Int32[np.ndarray, " S"], Int64[np.ndarray, " documents"]]:
    """Dtype, lengths and documents, once everything in the file is seen to fit together."""
    if not path.is_file():
        raise PostTrainingError("no such file", where=str(path))
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        dtype, num_sequences, num_marks = _parse_header(header, path)
        expected = HEADER.size + 12 * num_sequences + 8 * num_marks
        if (found := path.stat().st_size) != expected:
            raise PostTrainingError(
                f"{found:,} bytes, must be {expected:,} for {num_sequences:,} sequences and "
                f"{num_marks - 1:,} documents",
                where=str(path),
            )
        lengths = np.fromfile(file, "<i4", num_sequences)
        offsets = np.fromfile(file, "<i8", num_sequences)
        documents = np.fromfile(file, "<i8", num_marks)
    if lengths.min(initial=0) < 0:
        raise PostTrainingError("holds a negative length", where=str(path))
    if not np.array_equal(offsets, offsets_of(lengths, dtype)[:-1]):
        raise PostTrainingError("its offsets are not those of its lengths", where=str(path))
    if documents[0] != 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise PostTrainingError(
            f"its documents run from sequence {documents[0]} to {documents[-1]}, must run from 0 "
            f"to {num_sequences}, without a step back",
            where=str(path),
            hint="GPT-NeoX's merge tool writes such files: write it again from the text",
        )
    return dtype, lengths, documents


def _parse_header(header: bytes, path: Path) -> tuple[np.dtype, int, int]:
    if header.startswith(_LEGACY_MAGIC):
        raise PostTrainingError(
            "the legacy format TNTIDX, not MMIDIDX",
            where=str(path),
            hint="write it again from the text: entrypoint tokenize",
        )
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise PostTrainingError(f"not an index: starts with {header[:9]!r}", where=str(path))
    _, version, code, num_sequences, num_marks = HEADER.unpack(header)
    if version != VERSION:
        raise PostTrainingError(f"version {version}, must be {VERSION}", where=str(path))
    if code not in DTYPES:
        kind = "floats" if code in (6, 7) else "unknown"
        known = ", ".join(map(str, DTYPES))
        raise PostTrainingError(
            f"dtype code {code} ({kind}), must be one of {known}", where=str(path)
        )
    if num_marks == 0:
        raise PostTrainingError("has no document index", where=str(path))
    return np.dtype(DTYPES[code]), num_sequences, num_marks


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype of ids below `vocab_size`, as Megatron chooses it (DType.optimal_dtype)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """A context manager that writes a pair; on an error neither file is left.

    Tokens go to the file as they come; only lengths are kept.
    """

    def __init__(self, prefix: Path, dtype: np.dtype | type | str):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        known = {np.dtype(name): code for code, name in DTYPES.items()}
        if self.dtype not in known:
            raise PostTrainingError(f"tokens can't be stored as {self.dtype}", where=str(prefix))
        self._code = known[self.dtype]
        self._lengths = array("i")
        self._documents = array("q", [0])

    def __enter__(self) -> "IndexedWriter":
        with ExitStack() as stack:
            # Left in the opposite order: .bin is complete before .idx says so.
            self._new_index = stack.enter_context(atomic_file(index_path(self.prefix)))
            self._new_data = stack.enter_context(atomic_file(data_path(self.prefix)))
            self._data: IO[bytes] = stack.enter_context(open(self._new_data, "wb"))
            stack.push(self._finish)
            self._files = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    def append(
        self,
        tokens: Integer[np.ndarray, " T"],
        lengths: Integer[np.ndarray, " S"],
        sequences_per_document: Integer[np.ndarray, " documents"] | None = None,
    ) -> None:
        """Add sequences, whose tokens follow one another in `tokens`, in whole documents.

        sequences_per_document: by default each sequence is a document.
        Errors: PostTrainingError for an id that the dtype can't hold.
        """
        lengths = np.asarray(lengths, np.int64)
        if sequences_per_document is None:
            sequences_per_document = np.ones(len(lengths), np.int64)
        assert 0 <= lengths.min(initial=0) <= lengths.max(initial=0) < 2**31
        assert lengths.sum() == len(tokens)
        assert np.sum(sequences_per_document) == len(lengths)
        limits = np.iinfo(self.dtype)
        if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            wrong = tokens.min() if tokens.min() < limits.min else tokens.max()
            raise PostTrainingError(
                f"id {wrong} can't be stored as {self.dtype.name} ({limits.min} to {limits.max})",
                where=str(self.prefix),
            )
        self._data.write(np.ascontiguousarray(tokens, self.dtype))
        first = len(self._lengths)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        ends = first + np.cumsum(sequences_per_document, dtype=np.int64)
        self._documents.frombytes(ends.tobytes())

    def _finish(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            return
        if not self._lengths:
            raise PostTrainingError("no sequence to write", where=str(self.prefix))
        lengths = np.frombuffer(self._lengths, np.int32)
        header = (MAGIC, VERSION, self._code, len(lengths), len(self._documents))
        with open(self._new_index, "wb") as file:
            file.write(HEADER.pack(*header))
            file.write(lengths.astype("<i4"))
            file.write(offsets_of(lengths, self.dtype)[:-1])
            file.write(np.frombuffer(self._documents, np.int64).astype("<i8"))
        # First of all, since .bin is renamed before .idx: an older index beside new tokens would
        # open, and cut them at the wrong places.
        index_path(self.prefix).unlink(missing_ok=True)
