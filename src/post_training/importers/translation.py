"""What becomes of each key of another trainer's configuration.

A table says it by the key's dotted name. Its rules, in the order of what a user hopes for:

    Becomes(path)      one of our settings; `convert` where the value is written otherwise
    Ours(why)          how it is done here anyway, for the values in `accepts` (all, by default)
    Nothing(why)       no counterpart; values that turn it off are fine, others are refused
    a function         for keys that are read together; it calls the Translation's methods
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.config.faults import nearest
from post_training.core.errors import shown

_OFF = (None, False, 0, "", "none", "no", "None")
# A file may have anything anywhere: a rule that reads a list meets a number.
_WRONG_TYPE = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
_LAST_PART = re.compile(r"(\[\d+\]|\.?[^.\[\]]+)$")


@dataclass(frozen=True)
class Becomes:
    """convert: their value to ours. Errors of it: ValueError, which is told of the key."""

    path: str
    convert: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Ours:
    """accepts: the values for which it holds; others are refused with the same words."""

    why: str
    accepts: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Nothing:
    why: str


Handler = Callable[["Translation", str, Any], None]
Rule = Becomes | Ours | Nothing | Handler
Table = Mapping[str, Rule]


@dataclass(frozen=True)
class Line:
    """What became of a key. by_default: their file leaves it out, and this is what they do.
    has_value: it is one of their keys, and not a part of one."""

    key: str
    value: Any
    told: str
    by_default: bool = False
    has_value: bool = True

    def __str__(self) -> str:
        note = " (their default)" if self.by_default else ""
        value = f": {shown(self.value)}" if self.has_value else ""
        return f"{self.key}{value}{note} -> {self.told}"


@dataclass
class Translation:
    """given: {dotted key: value} of theirs. where: {dotted key: file and line}.

    num_processes: that train together, which few of their files say; None: not told.
    hints: what is to be done before a result loads. notes: what is to be known of one that does.
    of_deepspeed: {its file: what that says of training}, which our own settings have to say too.
    """

    given: dict[str, Any]
    where: dict[str, str] = field(default_factory=dict)
    num_processes: int | None = None
    stage: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    of_deepspeed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _are_defaults: bool = False

    def get(self, key: str, default: Any = None) -> Any:
        """Their value, or that of any key below it as a mapping."""
        value = self.given.get(key)
        return default if value is None else value

    def put(self, key: str, path: str, value: Any, note: str = "") -> None:
        """The key becomes our setting; one of their defaults does where nothing else did."""
        if self._are_defaults and self.has(path):
            return
        *parents, last = path.split(".")
        block = self.settings
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
        self.tell(key, f"{path}: {shown(value)}{f' ({note})' if note else ''}")

    def has(self, path: str) -> bool:
        block: Any = self.settings
        for part in path.split("."):
            if not isinstance(block, dict) or part not in block:
                return False
            block = block[part]
        return True

    def tell(self, key: str, told: str) -> None:
        line = Line(key, self.given.get(key), told, self._are_defaults, key in self.given)
        self.lines.append(line)

    def refuse(self, key: str, why: str) -> None:
        """key: one of theirs, or a part of its value, as in `datasets[0].split`."""
        where = self._place(key)
        named = f"{key}: {shown(self.given[key])}" if key in self.given else key
        self.faults.append(f"{where}: {named}: {why}" if where else f"{named}: {why}")

    def _place(self, key: str) -> str | None:
        """File and line of the key, or else of the nearest that it is a part of."""
        while key not in self.where and (above := _LAST_PART.sub("", key)) not in ("", key):
            key = above
        return self.where.get(key)

    def apply_defaults(self, table: Table, defaults: Mapping[str, Any]) -> None:
        """What they do where the file says nothing, and we would do otherwise."""
        missing = {key: value for key, value in defaults.items() if key not in self.given}
        self.given |= missing
        self._are_defaults = True
        self._apply(table, missing)

    def apply(self, table: Table) -> None:
        """Each key by its rule, in the order of the file."""
        self._apply(table, self.given)

    def _apply(self, table: Table, keys: Mapping[str, Any]) -> None:
        for key, value in list(keys.items()):
            rule = table.get(key)
            if rule is None and value is None:
                self.tell(key, "not set (and not known here)")
            elif rule is None:
                near = nearest(key, list(table))
                self.refuse(key, f"is not known here{near}; --drop {key} leaves it out")
            elif callable(rule):
                self._call(rule, key, value)
            elif value is None:
                self.tell(key, "not set")
            elif isinstance(rule, Becomes):
                self._become(key, value, rule)
            elif isinstance(rule, Ours):
                if rule.accepts is None or value in rule.accepts:
                    self.tell(key, f"no setting needed: {rule.why}")
                else:
                    self.refuse(key, f"{rule.why}; --drop {key} leaves it out")
            elif value in _OFF or value == [] or value == {}:
                self.tell(key, "off, same here")
            else:
                self.refuse(key, f"no counterpart: {rule.why}; --drop {key} leaves it out")

    def _call(self, rule: Handler, key: str, value: Any) -> None:
        try:
            rule(self, key, value)
        except _WRONG_TYPE:
            self.refuse(key, "is not a value that this key can have")

    def _become(self, key: str, value: Any, rule: Becomes) -> None:
        try:
            self.put(key, rule.path, rule.convert(value) if rule.convert else value)
        except ValueError as error:
            self.refuse(key, str(error))
        except TypeError:
            self.refuse(key, "is not a value that this key can have")


def flatten(data: Mapping[str, Any], whole: Sequence[str], prefix: str = "") -> Iterator[tuple]:
    """(dotted key, value) of every leaf. whole: keys whose mappings stay together."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in whole and value:
            yield from flatten(value, whole, f"{key}.")
        else:
            yield key, value


def becomes_if_set(path: str, otherwise: str) -> Handler:
    """A rule for a key that 0, false or null turns off: our setting, or what is told instead."""

    def handle(translation: Translation, key: str, value: Any) -> None:
        if value:
            translation.put(key, path, value)
        else:
            translation.tell(key, otherwise)

    return handle


def choose(**values: Any) -> Callable[[Any], Any]:
    """A `convert` by a table. Errors of it: ValueError with the names that are known."""

    def convert(value: Any) -> Any:
        name = str(value).lower()
        if name not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return values[name]

    return convert
