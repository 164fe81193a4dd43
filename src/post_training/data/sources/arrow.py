"""Rows of Arrow tables: parquet files, and folders that `datasets` saved.

A table is read batch by batch and never mapped into memory, so that its size doesn't matter. The
rejects file shows such a row as JSON. Dates, times and decimals, which JSON doesn't have, become
text: ISO 8601, and all of a decimal's digits.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.rows import BadRow, Place, Record
from post_training.data.sources import CHUNK_BYTES, CHUNK_ROWS, no_rows


@dataclass(frozen=True)
class ParquetSource:
    """A parquet file."""

    path: Path
    name: str

    def chunks(self) -> Iterator["ArrowChunk"]:
        # As a stream: else a whole row group, which may be the whole file, is read at once.
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
            values: list[Any] = _rows(batch)
        except (ValueError, OverflowError):
            values = [_value(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for number, value in enumerate(values, start=self.first_number):
            yield Record(Place(self.path, number), value, _raw(value))


def _value(row: pa.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        return _rows(row)[0]
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
        return BadRow("malformed", f"not UTF-8: {byte} of a text")
    except (ValueError, OverflowError) as error:  # a year beyond 9999
        return BadRow("malformed", f"not a date that can be written: {error}")


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Errors: UnicodeDecodeError, and ValueError or OverflowError for a date."""
    if not any(_has_text_form(field.type) for field in batch.schema):
        return batch.to_pylist()
    columns = [
        [_plain(cell) for cell in column] if _has_text_form(column.type) else column.to_pylist()
        for column in batch.columns
    ]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _has_text_form(kind: pa.DataType) -> bool:
    """Whether a value of the type, or one within it, becomes a text of ours."""
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return True
    if pa.types.is_dictionary(kind):
        return _has_text_form(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _has_text_form(kind.storage_type)
    return any(_has_text_form(kind.field(index).type) for index in range(kind.num_fields))


def _plain(cell: pa.Scalar) -> Any:
    kind = cell.type
    if not cell.is_valid or not _has_text_form(kind):
        return cell.as_py()
    if isinstance(cell, pa.StructScalar):
        return {name: _plain(value) for name, value in cell.items()}
    if pa.types.is_map(kind):
        return [[_plain(part) for part in entry.values()] for entry in cell.values]
    if pa.types.is_nested(kind):  # a list of some kind
        return [_plain(value) for value in cell.values]
    if pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        return _plain(cell.value)
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        microseconds, rest = divmod(cell.value, 1000)
        moment = pa.scalar(microseconds, pa.timestamp("us", kind.tz)).as_py()
        text = moment.isoformat(timespec="microseconds")
        # Python's datetime has no nanoseconds: three more digits follow its six.
        return moment.isoformat() if not rest else f"{text[:26]}{rest:03}{text[26:]}"
    if pa.types.is_duration(kind):
        digits = {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit]
        return f"PT{Decimal(cell.value).scaleb(-digits):f}S"
    value = cell.as_py()
    return str(value) if isinstance(value, Decimal) else value.isoformat()


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
    except (pa.ArrowException, EOFError, OSError) as error:
        # Of a damaged file Arrow raises an OSError without a number; one with a number is the
        # system's, and no fault of the file.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        problem = f"Arrow can't read it: {(str(error).splitlines() or ['it ends'])[0].lower()}"
        raise PostTrainingError(problem, where=str(path)) from None
