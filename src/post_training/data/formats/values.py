"""The first check of a JSON value of a row: is it there, and of the type it must have?

Each function returns the value, or raises BadRow. `key` is where the value stands in the row:
`messages[1].content`.
"""

import json
import math
from typing import Any

from post_training.data.rows import BadRow
from post_training.data.sources.json_rows import parse_value

_NAMES = {dict: "object", list: "list", str: "string", bool: "boolean"}


def required(row: dict[str, Any], column: str, key: str = "") -> Any:
    """row[column]. key: of the row, where it is not the file's own."""
    if column not in row:
        found = ", ".join(row) or "no column"
        problem = f"no column {column!r}; the row has: {found}"
        raise BadRow("columns", f"{key}: {problem}" if key else problem)
    return row[column]


def text(value: Any, key: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise wrong_type(key, "a string", value)
    return value


def filled_text(value: Any, key: str) -> str:
    """A string that is more than white space."""
    if not text(value, key).strip():
        raise BadRow("empty", f"{key}: is empty")
    return value


def list_of(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong_type(key, "a list", value)
    return value


def object_of(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(key, "an object", value)
    return value


def without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy without these fields."""
    return {name: each for name, each in value.items() if name not in names}


def is_number(value: Any) -> bool:
    """Finite, of a size that a float holds, and no boolean."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def says_something(value: Any) -> bool:
    """Whether there is anything in it: Arrow gives a row all columns, and an object all fields,
    null where a row had none."""
    if isinstance(value, dict):
        return any(map(says_something, value.values()))
    return value is not None and value != "" and value != []


def json_text(value: Any, key: str) -> str:
    """Errors: BadRow for what JSON can't say: a number that is not finite, a date, bytes."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(
            "tool-call", f"{key}: can't be written as JSON: {str(error).lower()}"
        ) from None


def from_json(value: str, key: str) -> Any:
    """The value of a text that must hold JSON (a column of Arrow has one type, so what has several
    is kept as text). It is read as strictly as a row: what a model is to write has to be JSON to
    every reader."""
    try:
        return parse_value(value)
    except ValueError as error:
        raise BadRow("tool-call", f"{key}: {error}") from None


def wrong_type(key: str, wanted: str, value: Any) -> BadRow:
    got = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
    return BadRow("columns", f"{key}: must be {wanted} (got {got})")
