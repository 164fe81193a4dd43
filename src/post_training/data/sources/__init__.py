"""Where rows come from: files, folders that `datasets` saved, and fetched hub datasets.

    Source.chunks()   in one process: cuts the file into pieces, without looking into them
    Chunk.records()   in any process: parses a piece; every row has a place and a verdict

A chunk is small (CHUNK_BYTES or CHUNK_ROWS), can be pickled, and depends on the file's content
alone, so that neither the memory needed nor the rows depend on the file's size or on the workers.
"""

from collections.abc import Iterator
from typing import Protocol

from post_training.core.errors import PostTrainingError
from post_training.data.rows import Record

CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 512


class Chunk(Protocol):
    """A piece of a source."""

    def records(self) -> Iterator[Record]: ...


class Source(Protocol):
    """Rows of one dataset. name: what messages and records call it."""

    @property
    def name(self) -> str: ...

    def chunks(self) -> Iterator[Chunk]:
        """Errors: PostTrainingError for a file that can't be cut, or has no row at all."""
        ...


def no_rows(path: object) -> PostTrainingError:
    return PostTrainingError("no rows", where=str(path))
