"""What a stage's configuration is made of, and which part of it is identity.

Every setting has a description, Field(description=…), and a role (docs/concepts/identity.md).
Unmarked settings are recipe:

    class Training(Config):
        learning_rate: PositiveFloat                       # recipe: what is computed
        num_processes: Annotated[int, Role.TOPOLOGY] = 1   # changes bits, not the intent
        output_dir: Annotated[Path, Role.PLACEMENT]        # where things go
        path: Annotated[Path, Role.INPUT]                  # counts by its content, not its name
        template: Annotated[str | Path, INPUT_IF_PATH]     # recipe as a name, input as a file

A setting that is added once runs are recorded is marked ADDED_LATER. At its default it is left out
of what is hashed and compared: what is computed is what it was, so its identity is too.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from post_training.core.errors import length_in_common, shown
from post_training.core.hashing import sha256_value

_MOST_CHARACTERS = 60
_CHARACTERS_BEFORE_CHANGE = 20


class Role(Enum):
    """What a setting counts for in the identity of a run."""

    RECIPE = "recipe"
    TOPOLOGY = "topology"
    PLACEMENT = "placement"
    INPUT = "input"


class Mark(Enum):
    """What else is said of a setting."""

    ADDED_LATER = "added later"
    INPUT_IF_PATH = "input where it is a path"


ADDED_LATER = Mark.ADDED_LATER
INPUT_IF_PATH = Mark.INPUT_IF_PATH


class Config(BaseModel):
    """Base of every configuration model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def not_default(config: Config, names: Iterable[str]) -> list[str]:
    """Of these settings, those that don't have their default."""
    # By value and not by what was set: a resolved configuration has every default written out.
    fields = type(config).model_fields
    return [
        name
        for name in names
        if getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]


def settings_by_role(config: Config) -> dict[Role, dict[str, Any]]:
    """{role: {dotted key: JSON value}} of every leaf setting; list items are `key[0]`.

    A marked field gives its role to everything below it. One that is ADDED_LATER is not among them
    while it has its default.
    """
    settings: dict[Role, dict[str, Any]] = {role: {} for role in Role}
    for key, value, role in _walk(config, "", None):
        settings[role][key] = value
    return settings


def input_paths(settings: dict[str, Any]) -> dict[str, str]:
    """{key: path} of the input settings that are set; a list of paths is `key[0]`, `key[1]`, …"""
    paths: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, list):
            paths |= {f"{key}[{index}]": item for index, item in enumerate(value)}
        elif value is not None:
            paths[key] = value
    return paths


def _walk(config: Config, prefix: str, inherited: Role | None) -> Iterator[tuple[str, Any, Role]]:
    dumped = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        if ADDED_LATER in field.metadata and not not_default(config, [name]):
            continue
        marked = next((mark for mark in field.metadata if isinstance(mark, Role)), None)
        role = inherited or marked
        key = f"{prefix}{name}"
        value = getattr(config, name)
        if INPUT_IF_PATH in field.metadata and isinstance(value, Path):
            role = Role.INPUT
        if isinstance(value, Config):
            yield from _walk(value, f"{key}.", role)
        elif isinstance(value, list | tuple) and any(isinstance(item, Config) for item in value):
            for index, item in enumerate(value):
                yield from _walk(item, f"{key}[{index}].", role)
        else:
            yield key, dumped[name], role or Role.RECIPE


def recipe_hash(stage_name: str, config: Config) -> str:
    """The identity of what a stage computes: sha256 of its name and its recipe settings; nothing of
    topology or placement."""
    return sha256_value({"stage": stage_name, "recipe": settings_by_role(config)[Role.RECIPE]})


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`training.learning_rate: 0.001 -> 0.002` for every dotted key whose value differs, sorted.

    Long values are shown from shortly before their first difference.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new and sha256_value(old[key]) == sha256_value(new[key]):
            continue
        before = shown(old[key], limit=None) if key in old else "(absent)"
        after = shown(new[key], limit=None) if key in new else "(absent)"
        start = max(0, length_in_common(before, after) - _CHARACTERS_BEFORE_CHANGE)
        lines.append(f"{key}: {_cut(before, start)} -> {_cut(after, start)}")
    return lines


def _cut(text: str, start: int) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    end = start + _MOST_CHARACTERS
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"
