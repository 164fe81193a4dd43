"""One JSON object, or what is wrong with the text that should have been one; a call's arguments and
tools that are kept as text are read as strictly.

Stricter than `json.loads`: a key that stands twice, NaN and Infinity, half of a surrogate pair and
very deep nesting are faults too, since the row would not mean the same to the next reader.
"""

import json
import re
from math import isinf
from typing import Any, NoReturn

from post_training.data.rows import BadRow

# Far below the interpreter's own limit, which depends on the caller: the verdict must not.
MAX_DEPTH = 100

# Of the escapes in a text, the first that is half of a surrogate pair.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


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
