"""`key.path[0].name=value` from the command line, set in plain data.

The value is YAML, read by the loader that reads the files: `lr=5e-7` is a number, `name=no` is
text, `stages=[sft, dpo]` a list, `path=null` nothing. It replaces what was there, mappings too.
A list grows by one when the index is its length.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from post_training.core import yaml
from post_training.core.errors import UsageError
from post_training.core.messages import KeyPath, dotted, shown
from post_training.core.secrets import redact

_NAME = re.compile(r"(?P<name>[^.\[\]\s]+)(?P<indices>(?:\[[0-9]+\])*)")


@dataclass(frozen=True)
class Override:
    """`text` is what the person wrote; messages quote it in place of a file and line."""

    text: str
    path: KeyPath
    value: Any

    @property
    def where(self) -> str:
        return _where(self.text)


def parse_override(text: str) -> Override:
    """Errors: UsageError, `override 'x..y=3': what is wrong`."""
    where = _where(text)
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError("has no value (write key=value)", where=where)
    if not key:
        raise UsageError("has no key (write key=value)", where=where)
    path = tuple(_parts(key, where))
    if not value.strip():
        problem = f"""has no value (write '{key}=null' for nothing, '{key}=""' for empty text)"""
        raise UsageError(problem, where=where)
    try:
        return Override(text, path, yaml.load(value, where).data)
    except UsageError as error:
        raise UsageError(error.problem, where=where) from None


def set_override(data: dict[str, Any], override: Override) -> None:
    """Set the value in `data`, creating the mappings on the way.

    Errors: UsageError when the path leads through a scalar or beyond a list's end.
    """
    here: Any = data
    for depth, part in enumerate(override.path[:-1]):
        _check_step(here, override, depth)
        if isinstance(here, dict):
            here = here.setdefault(part, [] if _is_index(override.path[depth + 1]) else {})
        else:
            if part == len(here):
                here.append([] if _is_index(override.path[depth + 1]) else {})
            here = here[part]
    _check_step(here, override, len(override.path) - 1)
    last = override.path[-1]
    if isinstance(here, list) and last == len(here):
        here.append(override.value)
    else:
        here[last] = override.value


def _where(text: str) -> str:
    return f"override {shown(redact(text)[0])}"


def _parts(key: str, where: str) -> Iterator[str | int]:
    for part in key.split("."):
        if not part:
            raise UsageError(f"an empty name in '{key}'", where=where)
        match = _NAME.fullmatch(part)
        if not match:
            raise UsageError(f"'{part}' is not a key (write section.list[0].name)", where=where)
        yield match["name"]
        yield from (int(index) for index in re.findall(r"[0-9]+", match["indices"]))


def _check_step(here: Any, override: Override, depth: int) -> None:
    """Refuse when `override.path[depth]` can't be set in `here`, the value at the path before."""
    part, parent = override.path[depth], dotted(override.path[:depth])
    if isinstance(part, int):
        if not isinstance(here, list):
            raise UsageError(f"{parent} is {_kind(here)}, not a list", where=override.where)
        if part > len(here):
            problem = f"{parent} has {len(here)} items: index {part} is beyond its end"
            raise UsageError(problem, where=override.where)
    elif not isinstance(here, dict):
        raise UsageError(f"{parent} is {_kind(here)}, not a mapping", where=override.where)


def _is_index(part: str | int) -> bool:
    return isinstance(part, int)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list (write its index: [0])"
    return shown(value)
