"""YAML in and out: the 1.2 core schema, plain data, and the line of every key.

`5e-7` is a number; `no`, `on`, `12:30:00` and `2020-01-01` are text; `0777` is 777. What makes a
configuration read otherwise than it looks is refused: duplicate keys, keys that are not text,
tags, aliases and merge keys (so nothing can expand either), a second document.
`load(dump(data), name).data == data` for all data that `dump` takes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from yaml import events

from post_training.core.errors import KeyPath, UsageError, shown

MAX_DEPTH = 100

_INT = r"[-+]?[0-9]+"
_OCTAL = r"0o[0-7]+"
_HEX = r"0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

# (a pattern of PyYAML's message, our words, whether to name the line where the construct starts).
_SYNTAX_FAULTS = (
    (r"'\\t' that cannot start", "a tab where only spaces may stand", False),
    (r"('.') that cannot start any token", r"text that starts with \1 must be quoted", False),
    (r"mapping values are not", "a ':' out of place (quote the text, or indent the key)", False),
    (r"could not find expected ':'", "a key without ': value'", True),
    (r"expected <block end>", "wrong indentation, or text after a closing quote", False),
    (r"end of stream", "a quote that is never closed", True),
    (r"expected ',' or '(.)'", r"a missing ',' or '\1'", False),
)


@dataclass(frozen=True)
class Document:
    """A document that was read.

    name: of the file.
    lines: {path of a key or list item, as ("data", 0, "name"): its line, from 1}.
    """

    name: str
    data: Any
    lines: dict[KeyPath, int]

    def where(self, path: KeyPath) -> str:
        """`file.yaml:12` of the key at `path`."""
        return f"{self.name}:{self.lines[path]}"


def load(text: str | bytes, name: str) -> Document:
    """Read one document.

    name: of the file, for messages.
    Errors: UsageError, `name:line: what is wrong`, for the first fault.
    """
    if isinstance(text, bytes):
        text = decode(text, name)
    if text.startswith("\ufeff"):
        raise UsageError("starts with a byte order mark: save it as UTF-8 without BOM", where=name)
    try:
        return _Builder(name, text).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{ord(text[error.position]):04X} is not allowed"
        raise UsageError(problem, where=f"{name}:{line}") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_fault(error, name) from None
    except (ValueError, OverflowError):  # PyYAML's own conversion of \U escapes
        raise UsageError("an escape is beyond U+10FFFF", where=name) from None


def dump(data: Any) -> str:
    """Write plain data as a document that `load` reads back equal; keys keep their order.

    Errors: TypeError for what is not dict with text keys, list, str, int, float, bool or None.
    """
    return yaml.dump(data, Dumper=_Dumper, allow_unicode=True, width=math.inf)


class _Builder:
    """Data and lines from PyYAML's events. Its own constructors know only YAML 1.1."""

    def __init__(self, name: str, text: str):
        self.name = name
        self.events: Iterator[events.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.lines: dict[KeyPath, int] = {}

    def document(self) -> Document:
        next(self.events)  # start of the stream
        if isinstance(next(self.events), events.StreamEndEvent):
            raise UsageError("is empty", where=self.name)
        data = self.value(next(self.events), ())
        next(self.events)  # end of the document
        following = next(self.events)
        if not isinstance(following, events.StreamEndEvent):
            raise self.fault(following, "a second document ('---'): only one is read")
        return Document(self.name, data, self.lines)

    def value(self, event: events.Event, path: KeyPath) -> Any:
        if isinstance(event, events.AliasEvent):
            raise self.fault(event, "aliases ('*') are not supported: write the value out")
        if event.tag is not None:
            raise self.fault(event, f"tags are not supported (found {event.tag})")
        if len(path) > MAX_DEPTH:
            raise self.fault(event, f"nested more than {MAX_DEPTH} levels deep")
        self.lines.setdefault(path, _line(event))
        if isinstance(event, events.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, events.SequenceStartEvent):
            return self.sequence(path)
        return self.scalar(event)

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            key = self.key(event, path)
            if key in result:
                first = self.lines[*path, key]
                raise self.fault(event, f"duplicate key {shown(key)} (first in line {first})")
            self.lines[*path, key] = _line(event)
            result[key] = self.value(next(self.events), (*path, key))
        return result

    def sequence(self, path: KeyPath) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self.events), events.SequenceEndEvent):
            result.append(self.value(event, (*path, len(result))))
        return result

    def key(self, event: events.Event, path: KeyPath) -> str:
        if not isinstance(event, events.ScalarEvent):
            raise self.fault(event, "a key must be text (got a mapping, a list or an alias)")
        key = self.value(event, path)
        if not isinstance(key, str):
            written = event.value or "nothing"
            raise self.fault(event, f"a key must be text (got {written}; quote it)")
        if key == "<<" and event.style is None:
            raise self.fault(event, "merge keys ('<<') are not supported")
        return key

    def scalar(self, event: events.ScalarEvent) -> Any:
        if any("\ud800" <= character <= "\udfff" for character in event.value):
            raise self.fault(event, "half of a surrogate pair: write the character itself")
        if event.style is not None:
            return event.value
        try:
            value = _plain(event.value)
            str(value)  # of a hexadecimal one it fails only here
            return value
        except ValueError:  # Python's limit on the digits of an integer
            raise self.fault(event, f"a number of {len(event.value)} digits") from None

    def fault(self, event: events.Event, problem: str) -> UsageError:
        return UsageError(problem, where=f"{self.name}:{_line(event)}")


class _Dumper(yaml.SafeDumper):
    """Writes plain data only, and quotes text that the core schema would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        lines = text.split("\n")
        style = "|" if len(lines) > 1 else None
        if not all(line.isprintable() for line in lines):
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def represent_number(self, number: float) -> yaml.Node:
        text = repr(number).replace("inf", ".inf").replace("nan", ".nan")
        return self.represent_scalar("tag:yaml.org,2002:float", text)

    def represent_keys(self, mapping: dict[str, Any]) -> yaml.Node:
        for key in mapping:
            if not isinstance(key, str):
                raise TypeError(f"a key must be text, not {key!r}")
        # PyYAML sorts the keys of a dict, but not a list of items.
        return self.represent_dict(mapping.items())

    def refuse(self, data: Any) -> yaml.Node:
        raise TypeError(f"not plain data: {data!r}")

    yaml_representers: ClassVar = {
        dict: represent_keys,
        list: yaml.SafeDumper.represent_list,
        str: represent_text,
        float: represent_number,
        int: yaml.SafeDumper.represent_int,
        bool: yaml.SafeDumper.represent_bool,
        type(None): yaml.SafeDumper.represent_none,
        None: refuse,
    }
    yaml_implicit_resolvers: ClassVar = {
        None: [
            ("tag:yaml.org,2002:merge", re.compile(r"<<\Z")),
            ("tag:yaml.org,2002:null", re.compile(r"(null|Null|NULL|~|)\Z")),
            ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
            ("tag:yaml.org,2002:int", re.compile(rf"({_INT}|{_OCTAL}|{_HEX})\Z")),
            ("tag:yaml.org,2002:float", re.compile(rf"({_FLOAT}|{_NOT_FINITE})\Z")),
        ]
    }


def _plain(text: str) -> Any:
    """The value of an unquoted scalar under the core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if re.fullmatch(f"{_OCTAL}|{_HEX}", text):
        return int(text, base=0)
    if re.fullmatch(_INT, text):
        return int(text)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    return float(text.replace(".", "")) if re.fullmatch(_NOT_FINITE, text) else text


def _line(event: events.Event) -> int:
    return event.start_mark.line + 1


def decode(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes. Errors: UsageError, with the line, for other bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"not UTF-8 (byte 0x{data[error.start]:02x})"
        raise UsageError(problem, where=f"{name}:{line}") from None


def _syntax_fault(error: yaml.MarkedYAMLError, name: str) -> UsageError:
    mark, words = error.problem_mark, error.problem
    for pattern, ours, at_start in _SYNTAX_FAULTS:
        if match := re.search(pattern, error.problem):
            mark = error.context_mark if at_start else mark
            words = match.expand(ours)
            break
    return UsageError(f"not valid YAML: {words}", where=f"{name}:{mark.line + 1}")
