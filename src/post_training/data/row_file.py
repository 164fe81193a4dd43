"""Rows as they are, gathered in one file, and written again in another order.

    sources -> read_chunk (workers) -> one JSON object a line -> chosen lines, in the chosen order

Rows are checked as for training, and keep whatever else they hold. Memory: some numbers a row.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from post_training.core.errors import PostTrainingError
from post_training.data.formats.columns import ColumnReport
from post_training.data.reading import Reader, Rejected, Verdicts, read_chunks
from post_training.data.rows import BadRow
from post_training.data.sources import Chunk, Source
from post_training.data.sources.json_rows import json_line

MAX_STRATA = 1000


@dataclass(frozen=True)
class LineReader:
    """What a worker needs to read rows as lines.

    stratify_by: a column that each row must have. source_column: a column that is added to the rows
    of dataset d, with names[d]; no row may have it.
    """

    reader: Reader
    stratify_by: str | None = None
    source_column: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChunkOfLines:
    """A chunk as lines: JSON objects in UTF-8. strata: of each line, its value in the column
    `stratify_by`, as JSON."""

    dataset: int
    lines: list[bytes]
    strata: list[str]
    rejected: list[Rejected]


def read_chunk(state: LineReader, item: tuple[int, Chunk]) -> ChunkOfLines:
    """The good rows of a chunk: checked as for training, and written again as they are."""
    dataset, chunk = item
    result = ChunkOfLines(dataset, [], [], [])
    for record in state.reader.records(chunk, dataset):
        try:
            for value in state.reader.values(record, dataset):
                state.reader.parse(value, dataset)
                line = json_line(_with_source(value, state, dataset))
                stratum = _stratum(value, state.stratify_by)
                result.lines.append(line)
                result.strata.append(stratum)
        except BadRow as bad:
            result.rejected.append(Rejected(record.place, bad, record.raw))
    return result


def _stratum(value: dict[str, Any], column: str | None) -> str:
    if column is None:
        return ""
    if column not in value:
        raise BadRow("columns", f"no column {column!r} to stratify by")
    return json.dumps(value[column], sort_keys=True)


def _with_source(value: dict[str, Any], state: LineReader, dataset: int) -> dict[str, Any]:
    column = state.source_column
    if column is None:
        return value
    if column in value:
        raise BadRow("columns", f"source_column: the row has a column {column!r} of its own")
    return {**value, column: state.names[dataset]}


@dataclass(frozen=True)
class RowFile:
    """Rows in one file, a JSON object a line.

    offsets: the first byte of each row; then the end. dataset, stratum: of each row.
    num_rows: by dataset.
    """

    path: Path
    offsets: Int64[np.ndarray, " bounds"]
    dataset: Int32[np.ndarray, " R"]
    stratum: Int32[np.ndarray, " R"]
    num_rows: list[int]

    def copy(self, rows: Int64[np.ndarray, " chosen"], path: Path) -> None:
        """Write these rows, in this order, to a new file."""
        with open(self.path, "rb") as source, open(path, "wb") as target:
            for row in map(int, rows):
                start, end = map(int, self.offsets[row : row + 2])
                target.write(os.pread(source.fileno(), end - start, start))


def gather(
    path: Path,
    state: LineReader,
    sources: Sequence[Source],
    verdicts: Verdicts,
    on_progress: Callable[[int], None],
    report: ColumnReport,
) -> RowFile:
    """Write every good row of every source to `path`.

    Errors: PostTrainingError for a bad row under on_error: fail, or more than MAX_STRATA strata.
    """
    config = state.reader.config
    offsets, datasets, stratum = array("q", [0]), array("i"), array("i")
    num_rows = [0] * len(sources)
    strata: dict[str, int] = {}
    seen: set[bytes] = set()
    with open(path, "wb") as file:
        for chunk in read_chunks(read_chunk, state, sources, config, num_rows.__getitem__, report):
            for rejected in chunk.rejected:
                verdicts.reject(rejected.place, rejected.bad, rejected.raw)
            for line, value in zip(chunk.lines, chunk.strata, strict=True):
                if config.debug_subsample == num_rows[chunk.dataset]:
                    break
                if config.deduplicate:
                    digest = hashlib.blake2b(line, digest_size=16).digest()
                    if digest in seen:
                        verdicts.count("duplicate")
                        continue
                    seen.add(digest)
                file.write(line)
                offsets.append(offsets[-1] + len(line))
                datasets.append(chunk.dataset)
                stratum.append(_number_of(value, strata))
                num_rows[chunk.dataset] += 1
            on_progress(len(datasets))
    return RowFile(
        path,
        np.array(offsets, np.int64),
        np.array(datasets, np.int32),
        np.array(stratum, np.int32),
        num_rows,
    )


def _number_of(value: str, strata: dict[str, int]) -> int:
    if value not in strata and len(strata) == MAX_STRATA:
        raise PostTrainingError(
            f"more than {MAX_STRATA} different values, one of them {value[:60]}",
            where="stratify_by",
            hint="stratify by a column of few values, such as a topic",
        )
    return strata.setdefault(value, len(strata))
