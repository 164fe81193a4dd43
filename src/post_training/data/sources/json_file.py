"""A file with one JSON array of objects, or, where it starts with an object, one object a line.

The array is cut between its items by a look at its brackets and strings alone, so that a file
larger than memory can be read, and a malformed item spoils only itself.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from post_training.core.errors import PostTrainingError
from post_training.data.rows import Place, Record
from post_training.data.sources import CHUNK_BYTES, CHUNK_ROWS, Chunk, no_rows
from post_training.data.sources.jsonl import JsonlSource
from post_training.data.sources.strict_json import parse_object

# What holds neither the end of an item nor a bracket: strings, and what stands between them. (Not
# with possessive quantifiers: they are wrong before Python 3.11.5, gh-106052.)
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_BETWEEN_ITEMS = re.compile(rb"(?:[^\"\[\]{},]+|" + _STRING + rb")*", re.DOTALL)
_INSIDE_ITEM = re.compile(rb"(?:[^\"\[\]{}]+|" + _STRING + rb")*", re.DOTALL)


@dataclass(frozen=True)
class JsonFileSource:
    path: Path
    name: str

    def chunks(self) -> Iterator[Chunk]:
        with open(self.path, "rb") as file:
            head = file.read(CHUNK_BYTES)
            start = len(head) - len(head.removeprefix(codecs.BOM_UTF8).lstrip())
            if head[start : start + 1] == b"[":
                file.seek(start + 1)
                yield from self._chunks_of_array(file, start + 1)
                return
        if start == len(head):
            raise no_rows(self.path)
        if head[start : start + 1] != b"{":
            problem = f"must be an array of objects (starts with {head[start : start + 10]!r})"
            raise PostTrainingError(problem, where=str(self.path))
        yield from JsonlSource(self.path, self.name).chunks()

    def _chunks_of_array(self, file: IO[bytes], start: int) -> Iterator["JsonItems"]:
        number, size, items = 1, 0, []
        for byte, item in _items(file, start, str(self.path)):
            items.append((byte, item))
            size += len(item)
            if size >= CHUNK_BYTES or len(items) == CHUNK_ROWS:
                yield JsonItems(str(self.path), number, items)
                number, size, items = number + len(items), 0, []
        if items:
            yield JsonItems(str(self.path), number, items)
        elif number == 1:
            raise no_rows(self.path)


@dataclass(frozen=True)
class JsonItems:
    """items: (byte offset in the file, text) of each."""

    path: str
    first_number: int
    items: list[tuple[int, bytes]]

    def records(self) -> Iterator[Record]:
        for number, (byte, item) in enumerate(self.items, start=self.first_number):
            yield Record(Place(self.path, number, byte), parse_object(item), item)


def _items(file: IO[bytes], start: int, path: str) -> Iterator[tuple[int, bytes]]:
    """(byte offset, text) of what stands between the commas of the array that `start` is in.

    Errors: PostTrainingError when the array has no end, or something follows it.
    """
    buffer, position, depth, is_first = b"", 0, 0, True
    # Twice as much each time while one string goes on, since it is looked at from its start.
    while more := file.read(max(CHUNK_BYTES, len(buffer))):
        # `buffer` starts with the item under way; what is before `position` has been looked at.
        buffer += more
        item_start = 0
        while True:
            pattern = _INSIDE_ITEM if depth else _BETWEEN_ITEMS
            match = pattern.match(buffer, position)
            assert match is not None
            position = match.end()
            sign = buffer[position : position + 1]
            if sign in (b"", b'"'):  # the rest of the item, or of a string, is still to be read
                break
            position += 1
            if sign in b"[{":
                depth += 1
            elif depth:
                depth -= 1
            else:
                text = buffer[item_start : position - 1]
                item = text.strip()
                ends = sign != b","
                if item or not (ends and is_first):
                    yield start + item_start + len(text) - len(text.lstrip()), item
                if ends:
                    _refuse_more(buffer[position:], file, path)
                    return
                item_start, is_first = position, False
        buffer, start = buffer[item_start:], start + item_start
        position -= item_start
    problem = "the array does not end, or a bracket or quote of an item is missing"
    raise PostTrainingError(problem, where=f"{path}: byte {start}")


def _refuse_more(rest: bytes, file: IO[bytes], path: str) -> None:
    while not rest.strip():
        if not (rest := file.read(CHUNK_BYTES)):
            return
    raise PostTrainingError(f"more after the array: {rest.strip()[:20]!r}", where=path)
