"""What the tests have done in worker processes, which find it by this module's name."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.config import FunctionLimits
from post_training.data.reading import Reader, Rejected
from post_training.data.rows import BadRow, Row
from post_training.data.sources import Chunk
from post_training.data.transforms import find_transform


@dataclass(frozen=True)
class OneRow:
    """A chunk that was read, with one row in it."""

    dataset: int
    chunk: str
    rejected: tuple[()] = ()


def read_one_row(state: Any, item: tuple[int, Any]) -> OneRow:
    return OneRow(*item)


def power(exponent: int, base: int) -> int:
    return base**exponent


def fail_at(limit: int, item: int) -> int:
    if item == limit:
        raise PostTrainingError(f"item {item} is bad")
    return item


def die_at(limit: int, item: int) -> int:
    if item == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def leave(code: int, item: int) -> int:
    os._exit(code)


def twice(paths: list[Path], answer: str) -> list[dict[str, Any]]:
    return next(find_transform("twice", paths, FunctionLimits())([{"answer": answer}], str))


@dataclass(frozen=True)
class ReadingState:
    reader: Reader


@dataclass(frozen=True)
class ReadRows:
    """rows: of a chunk, as they were parsed."""

    dataset: int
    rows: list[Row]
    rejected: list[Rejected]


def read_rows(state: ReadingState, item: tuple[int, Chunk]) -> ReadRows:
    dataset, chunk = item
    result = ReadRows(dataset, [], [])
    for record in state.reader.records(chunk, dataset):
        try:
            for value in state.reader.values(record, dataset):
                result.rows.extend(state.reader.parse(value, dataset))
        except BadRow as bad:
            result.rejected.append(Rejected(record.place, bad, record.raw))
    return result
