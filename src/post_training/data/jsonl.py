"""Rows of a JSONL file, each with the line it stands on.

A line is what ends in a newline byte: U+2028 and its like inside a string don't end one. A
byte-order mark at the start and blank lines are accepted; anything else that is not a JSON object
in UTF-8 is refused with `file.jsonl:LINE`.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) of every row, in the file's order.

    Errors: PostTrainingError for a malformed line, and for a file without any row.
    """
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            empty = False
            yield number, _parse(line.rstrip(b"\r\n"), f"{path}:{number}")
    if empty:
        raise PostTrainingError("no rows", where=str(path))


def _parse(line: bytes, where: str) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PostTrainingError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line",
            where=where,
        ) from None
    try:
        row = json.loads(text)
        if "\\ud" in text.lower():
            # A lone surrogate (`"\ud800"`) is valid JSON but no text: it can't be tokenised.
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"malformed JSON: {error.msg.lower()} at column {error.colno}"
        raise PostTrainingError(problem, where=where) from None
    except UnicodeEncodeError:
        problem = "malformed JSON: a \\u escape that is half of a surrogate pair"
        raise PostTrainingError(problem, where=where) from None
    except (RecursionError, ValueError) as error:
        raise PostTrainingError(f"malformed JSON: {error}", where=where) from None
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise PostTrainingError(f"must be a JSON object, one a line (got {kind})", where=where)
    return row
