"""Rows of JSON files: one object a line (.jsonl), or one array of objects (.json).

JSON is read more strictly than by `json.loads`: a key that stands twice, NaN and Infinity, half of
a surrogate pair and very deep nesting are faults too, since the row would not mean the same to the
next reader. Arguments of a call and tools that are kept as text are read as strictly
(formats/values.py).
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import IO, Any, NoReturn

from post_training.core.errors import PostTrainingError
from post_training.data.rows import BadRow, Place, Record
from post_training.data.sources import CHUNK_BYTES, CHUNK_ROWS, Chunk, no_rows

# Far below the interpreter's own limit of recursion, which depends on how deep the caller is; what
# is refused must not.
MAX_DEPTH = 100

# Of the escapes in a text, the first that is half of a surrogate pair.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
# What holds neither the end of an item nor a bracket: strings, and what stands between them. (Not
# with possessive quantifiers: they are wrong before Python 3.11.5, gh-106052.)
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_BETWEEN_ITEMS = re.compile(rb"(?:[^\"\[\]{},]+|" + _STRING + rb")*", re.DOTALL)
_INSIDE_ITEM = re.compile(rb"(?:[^\"\[\]{}]+|" + _STRING + rb")*", re.DOTALL)


@dataclass(frozen=True)
class JsonlSource:
    """JSON objects, one a line.

    A line is what ends in a newline byte: U+2028 and its like inside a string don't end one. A
    byte-order mark at the file's start and blank lines are accepted. The memory needed is that of
    the longest line.
    """

    path: Path
    name: str

    def chunks(self) -> Iterator["JsonlChunk"]:
        number, byte, empty = 1, 0, True
        with open(self.path, "rb") as file:
            while lines := file.readlines(CHUNK_BYTES):
                if byte == 0 and lines[0].startswith(codecs.BOM_UTF8):
                    byte = len(codecs.BOM_UTF8)
                    lines[0] = lines[0][byte:]
                empty = empty and not any(line.strip() for line in lines)
                yield JsonlChunk(str(self.path), number, byte, lines)
                number += len(lines)
                byte += sum(map(len, lines))
        if empty:
            raise no_rows(self.path)


@dataclass(frozen=True)
class JsonlChunk:
    """Lines of a file. first_number, first_byte: the place of the first of them."""

    path: str
    first_number: int
    first_byte: int
    lines: list[bytes]

    def records(self) -> Iterator[Record]:
        byte = self.first_byte
        for number, line in enumerate(self.lines, start=self.first_number):
            text = line.rstrip(b"\r\n")
            if text.strip():
                yield Record(Place(self.path, number, byte), parse_object(text), text)
            byte += len(line)


@dataclass(frozen=True)
class JsonFileSource:
    """A file with one JSON array of objects, or, where it starts with an object, one object a line.

    The array is cut between its items by a look at its brackets and strings alone, so that a file
    larger than memory can be read, and a malformed item spoils only itself.
    """

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
    """Items of an array. items: (byte offset in the file, text) of each."""

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
    # Twice as much each time while one string goes on: it is matched from its start each time, and
    # by a fixed step a long string would take quadratic time.
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


def parse_object(data: bytes) -> dict[str, Any] | BadRow:
    """The object that `data` holds; columns and bytes in a fault's text count from 1."""
    try:
        text = data.decode("utf-8")
        value = parse_value(text)
    except UnicodeDecodeError as error:
        return _malformed(f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1}")
    except ValueError as error:
        return _malformed(str(error))
    if not isinstance(value, dict):
        return _malformed(f"must be a JSON object (got {_JSON_NAMES[type(value)]})")
    return value


def parse_value(text: str) -> Any:
    """Any JSON value. Errors: ValueError, which says what is wrong in one line."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and isinstance(_first_value(text), dict):
            raise ValueError(f"more after the object, at column {error.colno}") from None
        problem = error.msg.lower().removesuffix(" at")
        raise ValueError(f"malformed JSON: {problem} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # our own hooks, and integers of thousands of digits
        raise ValueError(f"malformed JSON: {error}") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        for escape in _ESCAPE.finditer(text):
            if escape["half"]:
                raise ValueError(f"half of a surrogate pair at column {escape.start() + 1}")
    return value


def json_line(row: dict[str, Any]) -> bytes:
    """The row as a line that `parse_object` reads again. Errors: BadRow for what can't be one."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise BadRow("malformed", "a text holds half a character (lone surrogate)") from None
    except (TypeError, ValueError) as error:  # bytes, a date, a number that is none
        column = next(name for name, cell in row.items() if not _is_json(cell))
        problem = f"{column}: can't be written as JSON: {str(error).lower()}"
        raise BadRow("columns", problem) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _malformed(problem: str) -> BadRow:
    return BadRow("malformed", problem)


def _first_value(text: str) -> Any:
    return _DECODER.raw_decode(text, len(text) - len(text.lstrip()))[0]


def _deeper_than(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if limit == 0:
        return True
    items = value.values() if isinstance(value, dict) else value
    return any(_deeper_than(item, limit - 1) for item in items)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in an object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):  # 1e999: who reads it gets another number, and who writes it no JSON
        raise ValueError(f"{text[:20]} is beyond the largest number (1.8e308)")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant
)
