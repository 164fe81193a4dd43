"""JSON objects, one a line.

A line is what ends in a newline byte: U+2028 and its like inside a string don't end one. A
byte-order mark at the file's start and blank lines are accepted. The memory needed is that of the
longest line.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from post_training.data.rows import Place, Record
from post_training.data.sources import CHUNK_BYTES, no_rows
from post_training.data.sources.strict_json import parse_object


@dataclass(frozen=True)
class JsonlSource:
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
    """first_number, first_byte: the place of the first of `lines`."""

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
