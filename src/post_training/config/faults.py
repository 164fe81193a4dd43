"""pydantic's errors in our words: `run.yaml:12: training.lr: must be > 0 (got -1)`.

`explain` is all of it. It knows what the configuration models of this repository hold: values,
lists, mappings and models, and unions of such values. Of what none of them holds (enums, unions of
several models) it would say pydantic's own words.
"""

import difflib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from post_training.core.errors import KeyPath, dotted, shown

# pydantic's names of its errors, and what we say.
_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_LIMITS = {
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "finite_number": "finite",
    "string_pattern_mismatch": "text that matches {pattern}",
}
_LENGTHS = {
    "string_too_short": "at least {min_length} characters",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
}
_TYPE_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}
_PLURALS = {int: "integers", float: "numbers", str: "strings", Path: "paths"}
_LIMIT_WORDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_MOST_KEYS_LISTED = 12
_MOST_DESCRIBED = 3
# A key of another section is offered only where hardly a letter differs: max_step, not num_samples.
_NEAR_ELSEWHERE = 0.85
_IS_NAME = re.compile(r"[\w. -]{1,60}")

_SPLIT = "`entrypoint split` makes the rows to evaluate on; name them in evaluation.datasets"
_SPREAD = (
    "training does not spread a layer or its experts over processes; distributed.strategy: zero3 "
    "or fsdp2 divides the weights"
)
_BATCH = "set training.effective_batch_size: accumulation follows from it"
# What settings of other trainers (TRL, transformers, axolotl) are called here, by the last part of
# their name: the path of ours, or, where there is no single one, a sentence that says what to do. A
# path is offered only where the stage at hand has it.
OTHER_NAMES: dict[str, str] = {
    # models
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "tokenizer_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "flash_attention": "model.attn_implementation",
    "lora_r": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    # data
    "type": "format",
    "dataset_name": "hub",
    "dataset_prepared_path": "data.cache_dir",
    "max_length": "sft.max_seq_length",
    "sequence_len": "sft.max_seq_length",
    "sample_packing": "sft.packing",
    "completion_only_loss": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "train_on_inputs": "loss.prompt_loss_weight",
    "val_set_size": _SPLIT,
    "eval_size": _SPLIT,
    "eval_set_size": _SPLIT,
    "test_size": _SPLIT,
    # training
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.effective_batch_size",
    "gradient_accumulation_steps": _BATCH,
    "optim": "training.optimizer",
    "optim_args": "training.optimizer_args",
    "adam_beta1": "training.optimizer_args",
    "adam_beta2": "training.optimizer_args",
    "adam_epsilon": "training.optimizer_args",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "deepspeed": "distributed.strategy",
    "fsdp": "distributed.strategy",
    "sequence_parallel_size": "distributed.context_parallel_size",
    "context_parallel_degree": "distributed.context_parallel_size",
    "cp_size": "distributed.context_parallel_size",
    "sp_size": "distributed.context_parallel_size",
    "tp_size": _SPREAD,
    "tensor_parallel_degree": _SPREAD,
    "tensor_parallel_size": _SPREAD,
    "ep_size": _SPREAD,
    "expert_parallel_size": _SPREAD,
    "output_dir": "run_dir",
    # sampling
    "num_samples": "sampling.n",
    "num_generations": "sampling.n",
    "num_return_sequences": "sampling.n",
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_length": "sampling.max_tokens",
}


@dataclass(frozen=True)
class _Fault:
    """What to say of one of pydantic's errors.

    path: of the value. written: the path whose line in the file concerns it. words: what is wrong.
    union: the path of the union that was tried, if any; pydantic tells an error for each of its
    types. member: the type that was tried. wanted: the kind of value it takes, where the value is
    of another kind altogether, so that another type of the union may have been meant.
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
    faults = [_to_fault(model, detail, data) for detail in error.errors(include_url=False)]
    lines = []
    for union, group in groupby(faults, key=lambda fault: fault.union):
        for fault in group if union is None else _choose_meant(union, list(group)):
            place = [origin(fault.written), dotted(fault.path)]
            lines.append(": ".join([part for part in place if part] + [fault.words]))
    return list(dict.fromkeys(lines))


def describe_wrong_settings(
    model: type[BaseModel], error: ValidationError, data: dict[str, Any]
) -> str | None:
    """What the settings are whose values are missing or wrong: a line each, of the first few."""
    said = {}
    for detail in error.errors(include_url=False):
        path, _, _ = _locate(model, detail["loc"], data)
        field = fields_at(model, path[:-1]).get(path[-1]) if path else None
        if field and field.description:
            said[dotted(path)] = field.description
    lines = [f"{key}: {text}" for key, text in list(said.items())[:_MOST_DESCRIBED]]
    return "\n      ".join(lines) or None


def nearest(word: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def _to_fault(model: type[BaseModel], error: ErrorDetails, data: Any) -> _Fault:
    path, union, member = _locate(model, error["loc"], data)
    written, wanted = path, None
    match error["type"]:
        case "missing":
            written = _innermost_item(path)
            field = fields_at(model, path[:-1]).get(path[-1])
            words = f"missing ({describe(field)})" if field else "missing"
        case "extra_forbidden":
            path, words = path[:-1], _unknown_key(model, path)
        case "literal_error":
            wanted = error["ctx"]["expected"]
            choices = re.findall(r"'([^']*)'", wanted)  # of "'a', 'b' or 'c'"
            words = f"must be {wanted} (got {shown(error['input'])})"
            words += nearest(str(error["input"]), choices)
        case kind:
            wanted = _KINDS.get(kind)
            words = _wrong_value(error)
            if wanted == "a mapping" and (field := fields_at(model, path[:-1]).get(path[-1])):
                needed = describe(field)
                if needed.startswith("a mapping with "):
                    words = f"must be {needed} (got {shown(error['input'])})"
    wanted = wanted if path == union else None
    return _Fault(path, written, words, error["input"], union, member, wanted)


def _wrong_value(error: ErrorDetails) -> str:
    kind, got = error["type"], error["input"]
    context = {name: _brief(limit) for name, limit in error.get("ctx", {}).items()}
    if kind == "value_error":  # of one of our own validators
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
    """The path in the data; and the first union on the way, with the type that was tried.

    pydantic's location names types of unions among the keys; what is neither in the data nor a
    field is one of them.
    """
    here, path, union, member = data, (), None, None
    for part in location:
        if isinstance(here, list) and isinstance(part, int):  # a fixed tuple may lack the item
            here, path = here[part] if part < len(here) else None, (*path, part)
        elif isinstance(here, dict) and part in here:
            here, path = here[part], (*path, part)
        elif part in fields_at(model, path):
            here, path = None, (*path, part)
        elif union is None:
            union, member = path, part
    return path, union, member


def _choose_meant(union: KeyPath, faults: list[_Fault]) -> list[_Fault]:
    """What the type that was meant says; if none was, one fault with the kinds it may be."""
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


def _unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    """Offer what other trainers' name for it is called here, the nearest key at this level, and the
    same key where another section has it; a key that is merely near is offered from this level
    alone."""
    key = str(path[-1])
    if not _IS_NAME.fullmatch(key):
        # Of a file that is no configuration, lines of which may be secret.
        return "a key that is no setting's name"
    here = fields_at(model, path[:-1])
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
        offered = [_with_place(other)]
    else:
        offered = difflib.get_close_matches(key, here, n=1)
    offered += [_with_place(path) for path in elsewhere.get(key, [])[:2]]
    if not offered:
        near = difflib.get_close_matches(key, elsewhere, n=1, cutoff=_NEAR_ELSEWHERE)
        offered = [_with_place(elsewhere[name][0]) for name in near]
    if offered:
        quoted = (name if " " in name else f"'{name}'" for name in dict.fromkeys(offered))
        return f"unknown key '{key}', did you mean {' or '.join(quoted)}?"
    known = f" (known: {', '.join(here)})" if len(here) <= _MOST_KEYS_LISTED else ""
    return f"unknown key '{key}'{known}"


def _initials(name: str) -> str:
    """lr of learning_rate."""
    return "".join(word[:1] for word in name.split("_"))


def _with_place(path: str) -> str:
    """The path of a key in another section, which the reader is told."""
    return path if "." in path else f"'{path}' at the top level"


def describe(field: FieldInfo) -> str:
    """The type and limits in plain words: `an integer > 0`, `a list of paths`."""
    words = [
        _kind(member) + _limits(marks) for member, marks in _union_with_marks(field.annotation)
    ]
    return " or ".join(dict.fromkeys(words)) + _limits(field.metadata)


def _limits(marks: Sequence[Any]) -> str:
    flat = [inner for mark in marks for inner in getattr(mark, "metadata", [mark])]
    limits = [
        f" {sign} {getattr(mark, name)}"
        for name, sign in _LIMIT_WORDS
        for mark in flat
        if getattr(mark, name, None) is not None
    ]
    return " and".join(limits)


def _kind(member: Any) -> str:
    if is_model(member):
        needed = [key for key, field in member.model_fields.items() if field.is_required()]
        return f"a mapping with {', '.join(needed)}" if needed else "a mapping"
    if get_origin(member) is Literal:
        return f"one of {', '.join(map(repr, get_args(member)))}"
    if member in _TYPE_WORDS:
        return _TYPE_WORDS[member]
    if _is_mapping(member):
        return "a mapping"
    if arguments := get_args(member):
        items = {_PLURALS.get(inner) for inner in union_types(arguments[0])}
        named = items.pop() if len(items) == 1 else None
        return f"a list of {named}" if named else "a list"
    return "a value"


def fields_at(model: type[BaseModel], path: KeyPath) -> dict[str, FieldInfo]:
    """{key: field} of the mapping at `path`; nothing where the model has none there."""
    members: list[Any] = [model]
    for part in path:
        members = [inner for member in members for inner in _types_inside(member, part)]
    models = [member for member in members if is_model(member)]
    return {key: field for found in models for key, field in found.model_fields.items()}


def paths_of_keys(model: type[BaseModel], *, but: str) -> dict[str, list[str]]:
    """{key: dotted paths of this model that end in it}, `[]` for any index; `but` left out."""
    paths: dict[str, list[str]] = {}
    for key, path in _walk_keys(model, ""):
        if path != but:
            paths.setdefault(key, []).append(path)
    return paths


def _walk_keys(annotation: Any, path: str) -> Iterator[tuple[str, str]]:
    """(key, path) of every field of the models in `annotation`, which stands at `path`."""
    for member in union_types(annotation):
        if is_model(member):
            for key, field in member.model_fields.items():
                here = f"{path}.{key}" if path else key
                yield key, here
                yield from _walk_keys(field.annotation, here)
        else:
            for argument in get_args(member):
                yield from _walk_keys(argument, f"{path}[]")


def union_types(annotation: Any) -> Iterator[Any]:
    """The types of a union, through Annotated."""
    return (member for member, _ in _union_with_marks(annotation))


def _union_with_marks(annotation: Any, marks: Sequence[Any] = ()) -> Iterator[tuple[Any, Any]]:
    """(type, what Annotated says of it) of each type of a union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *own = get_args(annotation)
        yield from _union_with_marks(inner, [*marks, *own])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _union_with_marks(member, marks)
    else:
        yield annotation, marks


def _types_inside(member: Any, part: str | int) -> Iterator[Any]:
    """The types of what stands at `part` in a value of type `member`."""
    arguments = [argument for argument in get_args(member) if argument is not ...]
    if is_model(member):
        if part in member.model_fields:
            yield from union_types(member.model_fields[part].annotation)
    elif not arguments or get_origin(member) is Literal:
        return
    elif _is_mapping(member):
        yield from union_types(arguments[-1])
    elif isinstance(part, int):
        yield from union_types(arguments[min(part, len(arguments) - 1)])


def is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _is_mapping(member: Any) -> bool:
    kind = get_origin(member) or member
    return isinstance(kind, type) and issubclass(kind, Mapping)
