"""Rows of Arrow tables: parquet files, and folders that `datasets` saved.

A table is read batch by batch and never mapped into memory, so that its size doesn't matter. The
rejects file shows such a row as JSON.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.rows import BadRow, Place, Record
from post_training.data.sources import CHUNK_BYTES, CHUNK_ROWS, no_rows


@dataclass(frozen=True)
class ParquetSource:
    path: Path
    name: str

    def chunks(self) -> Iterator["ArrowChunk"]:
        # Read as a stream, or a row group, which may be the whole file, would be read at once.
        streamed = {"pre_buffer": False, "buffer_size": CHUNK_BYTES}
        with _refusing(self.path), pq.ParquetFile(self.path, **streamed) as file:
            yield from _chunks(file.iter_batches(CHUNK_ROWS), self.path)


@dataclass(frozen=True)
class SavedSource:
    """A folder that `Dataset.save_to_disk` wrote, or one split of a `DatasetDict`'s."""

    path: Path
    name: str

    def chunks(self) -> Iterator["ArrowChunk"]:
        yield from _chunks(self._batches(), self.path)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for entry in _listed(self.path / "state.json", "_data_files"):
            path = self.path / entry["filename"]
            with _refusing(path), pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                yield from stream


def open_saved(path: Path, split: str | None, name: str) -> SavedSource:
    """Errors: UsageError when it is no saved dataset, or `split` is missing or not one of it."""
    if (path / "dataset_dict.json").is_file():
        splits = _listed(path / "dataset_dict.json", "splits")
        if split not in splits:
            problem = f"no split {split!r}" if split else "it has several splits"
            hint = f"set split: {' | '.join(splits)}"
            raise UsageError(problem, where=str(path), hint=hint)
        return SavedSource(path / split, name)
    if not (path / "state.json").is_file():
        raise UsageError("not a folder that `datasets` saved: no state.json", where=str(path))
    if split is not None:
        problem = f"no split {split!r}: it is a single dataset"
        raise UsageError(problem, where=str(path), hint="leave split out")
    return SavedSource(path, name)


def _listed(path: Path, key: str) -> list[Any]:
    """What one of the records of `datasets` lists."""
    try:
        return list(json.loads(path.read_bytes())[key])
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"no JSON record with a list {key!r}", where=str(path)) from None


@dataclass(frozen=True)
class ArrowChunk:
    """stream: one record batch in Arrow's stream format. (A pickled slice would take its whole
    table along.)"""

    path: str
    first_number: int
    stream: bytes

    def records(self) -> Iterator[Record]:
        batch = pa.ipc.open_stream(self.stream).read_next_batch()
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = [_value(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for number, value in enumerate(values, start=self.first_number):
            yield Record(Place(self.path, number), value, _raw(value))


def _value(row: pa.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
        return BadRow("malformed", f"not UTF-8: {byte} of a text")


def _raw(value: dict[str, Any] | BadRow) -> bytes:
    if isinstance(value, BadRow):
        return b""
    return json.dumps(value, ensure_ascii=False, default=str).encode()


def _chunks(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[ArrowChunk]:
    number = 1
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PostTrainingError(f"column {twice!r} stands twice", where=str(path))
        size = _rows_a_chunk(batch)
        for start in range(0, batch.num_rows, size):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch.slice(start, size))
            yield ArrowChunk(str(path), number + start, sink.getvalue().to_pybytes())
        number += batch.num_rows
    if number == 1:
        raise no_rows(path)


def _rows_a_chunk(batch: pa.RecordBatch) -> int:
    return min(CHUNK_ROWS, max(1, CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)))


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """A file that Arrow can't read is the user's to mend."""
    try:
        yield
    except (pa.ArrowException, EOFError) as error:
        problem = f"Arrow can't read it: {str(error).splitlines()[0].lower()}"
        raise PostTrainingError(problem, where=str(path)) from None
