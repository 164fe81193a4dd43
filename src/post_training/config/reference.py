"""What the settings of a configuration are, from its models.

The reference in docs/ and `entrypoint STAGE --help-config` show it.

A setting's path is that of a configuration file, with `[]` for any item of a list:
`data.datasets[].path`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from post_training.config.faults import describe, is_model, union_types
from post_training.config.model import Config, Role
from post_training.core.errors import UsageError, shown

_REQUIRED = "required"


@dataclass(frozen=True)
class Setting:
    """path: as above. kind: type and limits in words. default: `required`, or its value as YAML;
    empty for a block, whose settings have their own. role: what it counts for in a run's identity.
    """

    path: str
    kind: str
    default: str
    role: Role
    description: str

    @property
    def is_block(self) -> bool:
        """Whether it holds other settings, which follow it."""
        return not self.default

    def as_json(self) -> dict[str, str]:
        """For `--json`."""
        return {**asdict(self), "role": self.role.value}


def list_settings(
    model: type[BaseModel], prefix: str = "", role: Role | None = None
) -> Iterator[Setting]:
    """Every setting in the order of the model, each block before what it holds."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        marked = next((mark for mark in field.metadata if isinstance(mark, Role)), None)
        counts_as = role or marked
        blocks = list(_blocks_in(field.annotation, path))
        yield Setting(
            path,
            describe(field),
            _default(field),
            counts_as or Role.RECIPE,
            field.description or "",
        )
        for below, block in blocks:
            yield from list_settings(block, f"{below}.", counts_as)


def find_settings(model: type[BaseModel], key: str) -> list[Setting]:
    """The setting of this path and those below it. An index (`data.datasets[0]`) is any item.

    Errors: UsageError, with the nearest paths, if there is none.
    """
    settings = list(list_settings(model))
    wanted = _without_indices(key)
    found = [
        setting
        for setting in settings
        if (path := _without_indices(setting.path)) == wanted or path.startswith(f"{wanted}.")
    ]
    if found:
        return found
    known = {setting.path: setting.path for setting in settings}
    last = {setting.path.rpartition(".")[2]: setting.path for setting in reversed(settings)}
    near = [last[key]] if key in last else difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "without KEY all are listed"
    raise UsageError(f"no setting '{key}'", hint=hint)


@dataclass(frozen=True)
class ChosenSetting:
    """A setting of a recorded run. default: None where the model has no such setting (any more)."""

    key: str
    value: str
    default: str | None

    @property
    def is_changed(self) -> bool:
        return self.value != self.default


def beside_defaults(model: type[BaseModel], recorded: Mapping[str, Any]) -> list[ChosenSetting]:
    """The settings of a record, {dotted key: value}, with their defaults, as YAML."""
    defaults: dict[str, list[str]] = {}
    for setting in list_settings(model):
        defaults.setdefault(_without_indices(setting.path), []).append(setting.default)
    chosen = []
    for key, value in recorded.items():
        text = _as_yaml(value)
        # Several, where a block is one of several kinds: a default of any kind is none of the user.
        known = defaults.get(_without_indices(key), [])
        default = text if text in known else next(iter(known), None)
        chosen.append(ChosenSetting(key, text, default))
    return chosen


def list_lines(settings: Sequence[Setting]) -> list[str]:
    """A line each: path, kind, default. For a terminal."""
    width = max(len(setting.path) for setting in settings)
    return [
        f"{setting.path:{width}}  {_kind_and_default(setting)}".rstrip() for setting in settings
    ]


def explain_lines(settings: Sequence[Setting]) -> list[str]:
    """Path, kind, default and what it counts for; the description below. For a terminal."""
    lines: list[str] = []
    for setting in settings:
        lines += [f"{setting.path}: {_kind_and_default(setting)} [{setting.role.value}]"]
        lines += [f"    {setting.description}"]
    return lines


def _kind_and_default(setting: Setting) -> str:
    if setting.is_block:
        return setting.kind
    default = setting.default
    return f"{setting.kind}, {default if default == _REQUIRED else f'default {default}'}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return _REQUIRED
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, Config) else _as_yaml(value)


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return value if isinstance(value, str) and value else shown(value)


def _blocks_in(annotation: Any, path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(path, model) of the blocks that a setting of this type holds."""
    for member in union_types(annotation):
        if is_model(member):
            yield path, member
        else:
            for argument in get_args(member):
                yield from _blocks_in(argument, f"{path}[]")


def _without_indices(path: str) -> str:
    return re.sub(r"\[\d*\]", "", path)
