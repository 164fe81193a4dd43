"""pydantic's errors in our words: `run.yaml:12: training.lr: must be > 0 (got -1)`."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from post_training.config.other_names import OTHER_NAMES
from post_training.config.schema import choices_at, describe, fields_at, paths_of_keys
from post_training.core.messages import KeyPath, dotted, shown

_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}
_LIMITS = {
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "finite",
    "string_pattern_mismatch": "text that matches {pattern}",
}
_LENGTHS = {
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
}
_MOST_KEYS_LISTED = 12
# A key of another section is offered only where hardly a letter differs: max_step, not num_samples.
_NEAR_ELSEWHERE = 0.85
_IS_NAME = re.compile(r"[\w. -]{1,60}")


@dataclass(frozen=True)
class _Fault:
    """What to say of `path`. `written`: the path whose line in the file concerns it.

    Where a union was tried: its path, the member, and the kind of value the member wants when it
    got another kind altogether, so that another member may have been meant.
    """

    path: KeyPath
    written: KeyPath
    words: str
    got: Any
    union: KeyPath | None = None
    member: str | int | None = None
    wanted: str | None = None


def explain(
    model: type[BaseModel],
    error: ValidationError,
    data: dict[str, Any],
    origin: Callable[[KeyPath], str],
) -> list[str]:
    """One line a fault, in the order of the model. `origin`: path -> `file.yaml:12`."""
    faults = [_fault(model, detail, data) for detail in error.errors(include_url=False)]
    lines = []
    for union, group in groupby(faults, key=lambda fault: fault.union):
        for fault in group if union is None else _meant(union, list(group)):
            place = [origin(fault.written), dotted(fault.path)]
            lines.append(": ".join([part for part in place if part] + [fault.words]))
    return list(dict.fromkeys(lines))


def nearest(word: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def _fault(model: type[BaseModel], error: ErrorDetails, data: Any) -> _Fault:
    path, union, member = _locate(model, error["loc"], data)
    written, context, wanted = path, error.get("ctx", {}), None
    match error["type"]:
        case "missing":
            written = _innermost_item(path)
            field = fields_at(model, path[:-1], data).get(path[-1])
            words = f"missing ({describe(field)})" if field else "missing"
        case "extra_forbidden":
            path, words = path[:-1], _unknown_key(model, path, data)
        case "union_tag_not_found":
            path = (*path, _discriminator(context))
            words = f"missing (one of {', '.join(map(repr, choices_at(model, path)))})"
        case "union_tag_invalid":
            path = (*path, _discriminator(context))
            words = _wrong_choice(context["tag"], f"one of {context['expected_tags']}")
        case "literal_error" | "enum":
            wanted = context["expected"]
            words = _wrong_choice(error["input"], wanted)
        case kind:
            wanted = _KINDS.get(kind)
            words = _wrong_value(error)
            if wanted == "a mapping" and (field := fields_at(model, path[:-1], data).get(path[-1])):
                needed = describe(field).split(":")[0]
                if needed.startswith("a mapping with "):
                    words = f"must be {needed} (got {shown(error['input'])})"
    wanted = wanted if path == union else None
    return _Fault(path, written, words, error["input"], union, member, wanted)


def _discriminator(context: dict[str, Any]) -> str:
    return context["discriminator"].strip("'")


def _wrong_choice(got: Any, choices: str) -> str:
    return f"must be {choices} (got {shown(got)}){nearest(str(got), _quoted(choices))}"


def _quoted(choices: str) -> list[str]:
    """[a, b] of pydantic's "'a' or 'b'"."""
    return re.findall(r"'([^']*)'", choices)


def _wrong_value(error: ErrorDetails) -> str:
    kind, got = error["type"], error["input"]
    context = {name: _brief(limit) for name, limit in error.get("ctx", {}).items()}
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind in _LENGTHS:
        limit = _LENGTHS[kind].format(**context)
        return f"must have {limit} (has {len(got)})"
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind].format(**context)} (got {shown(got)})"
    if kind == "int_type" and isinstance(got, float) and got.is_integer():
        return f"must be an integer (got {got}; write {int(got)})"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]} (got {shown(got)})"
    return f"{error['msg'][0].lower()}{error['msg'][1:]} (got {shown(got)})"


def _brief(limit: Any) -> Any:
    """0 for 0.0: a limit is read, not computed with."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _locate(
    model: type[BaseModel], location: Sequence[str | int], data: Any
) -> tuple[KeyPath, KeyPath | None, str | int | None]:
    """The path in the data; and the first union on the way, with the member that was tried.

    pydantic's location names union members among the keys; what is neither in the data nor a
    field is one of them.
    """
    here, path, union, member = data, (), None, None
    for part in location:
        if isinstance(here, list) and isinstance(part, int):  # a fixed tuple may lack the item
            here, path = here[part] if part < len(here) else None, (*path, part)
        elif isinstance(here, dict) and part in here:
            here, path = here[part], (*path, part)
        elif part in fields_at(model, path, data):
            here, path = None, (*path, part)
        elif union is None:
            union, member = path, part
    return path, union, member


def _meant(union: KeyPath, faults: list[_Fault]) -> list[_Fault]:
    """What the member that was meant says; if none was, one fault with the kinds it may be."""
    members: dict[str | int | None, list[_Fault]] = {}
    for fault in faults:
        members.setdefault(fault.member, []).append(fault)
    meant = [said for said in members.values() if not any(fault.wanted for fault in said)]
    if meant:
        return min(meant, key=len)
    wanted = dict.fromkeys(fault.wanted for fault in faults if fault.wanted)
    words = f"must be {' or '.join(wanted)} (got {shown(faults[0].got)})"
    return [replace(faults[0], path=union, words=words)]


def _innermost_item(path: KeyPath) -> KeyPath:
    """The path up to its last list index: a missing key has no line of its own."""
    lengths = [length for length, part in enumerate(path, start=1) if isinstance(part, int)]
    return path[: lengths[-1]] if lengths else ()


def _initials(name: str) -> str:
    """lr of learning_rate."""
    return "".join(word[:1] for word in name.split("_"))


def _unknown_key(model: type[BaseModel], path: KeyPath, data: Any) -> str:
    """Offer what other trainers' name for it is called here, the nearest key at this level, and the
    same key where another section has it; a key that is merely near is offered from this level
    alone."""
    key = str(path[-1])
    if not _IS_NAME.fullmatch(key):
        # Of a file that is no configuration, lines of which may be secret.
        return "a key that is no setting's name"
    here = fields_at(model, path[:-1], data)
    written = re.sub(r"\[\d+\]", "[]", dotted(path))
    elsewhere = paths_of_keys(model, but=written)
    other = OTHER_NAMES.get(key, "")
    section, _, name = other.rpartition(".")
    if abbreviated := [full for full in here if _initials(full) == key]:
        offered = abbreviated[:1]
    elif " " in other:
        return f"unknown key '{key}': {other}"
    elif name in here and section in ("", written.rpartition(".")[0]):
        offered = [name]
    elif other in elsewhere.get(name, []):
        offered = [_placed(other)]
    else:
        offered = difflib.get_close_matches(key, here, n=1)
    offered += [_placed(path) for path in elsewhere.get(key, [])[:2]]
    if not offered:
        near = difflib.get_close_matches(key, elsewhere, n=1, cutoff=_NEAR_ELSEWHERE)
        offered = [_placed(elsewhere[name][0]) for name in near]
    if offered:
        quoted = (name if " " in name else f"'{name}'" for name in dict.fromkeys(offered))
        return f"unknown key '{key}', did you mean {' or '.join(quoted)}?"
    known = f" (known: {', '.join(here)})" if len(here) <= _MOST_KEYS_LISTED else ""
    return f"unknown key '{key}'{known}"


def _placed(path: str) -> str:
    """The path of a key in another section, which the reader is told."""
    return path if "." in path else f"'{path}' at the top level"
