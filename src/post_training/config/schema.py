"""What a configuration model may hold at a path: its fields, and their types in plain words."""

import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from post_training.core.messages import KeyPath

_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}
_LIMITS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def fields_at(model: type[BaseModel], path: KeyPath, data: Any) -> dict[str, FieldInfo]:
    """{key: field} of the mapping at `path`; where it is a union, of the members `data` names."""
    models = _models_at(model, path)
    for part in path:
        data = data[part] if isinstance(data, dict | list) and _has(data, part) else None
    meant = [member for member in models if _fits(member, data)] or models
    return {key: field for member in meant for key, field in member.model_fields.items()}


def choices_at(model: type[BaseModel], path: KeyPath) -> list[Any]:
    """The values a discriminator may have: the literals of every member of the union."""
    fields = [member.model_fields.get(path[-1]) for member in _models_at(model, path[:-1])]
    return [choice for field in fields if field for choice in _literals(field)]


def paths_of_keys(model: type[BaseModel], *, but: str) -> dict[str, list[str]]:
    """{key: dotted paths of this model that end in it}, `[]` for any index; `but` left out."""
    paths: dict[str, list[str]] = {}
    for key, path in _walk(model, "", ()):
        if path != but:
            paths.setdefault(key, []).append(path)
    return paths


def describe(field: FieldInfo) -> str:
    """`an integer > 0: optimizer steps`."""
    kinds = dict.fromkeys(_kind(member) for member in _members(field.annotation))
    words = " or ".join(kinds)
    for name, sign in _LIMITS:
        for mark in field.metadata:
            if getattr(mark, name, None) is not None:
                words += f" {sign} {getattr(mark, name)}"
    return f"{words}: {field.description}" if field.description else words


def _kind(member: Any) -> str:
    if _is_model(member):
        needed = [key for key, field in member.model_fields.items() if field.is_required()]
        return f"a mapping with {', '.join(needed)}" if needed else "a mapping"
    if get_origin(member) is Literal:
        return f"one of {', '.join(map(repr, get_args(member)))}"
    if isinstance(member, type) and issubclass(member, Enum):
        return f"one of {', '.join(repr(choice.value) for choice in member)}"
    if member in _KINDS:
        return _KINDS[member]
    return "a mapping" if _is_mapping(member) else "a list" if get_args(member) else "a value"


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, through Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _inside(member: Any, part: str | int) -> Iterator[Any]:
    """The types of what stands at `part` in a value of type `member`."""
    arguments = [argument for argument in get_args(member) if argument is not ...]
    if _is_model(member):
        if part in member.model_fields:
            yield from _members(member.model_fields[part].annotation)
    elif not arguments or get_origin(member) is Literal:
        return
    elif _is_mapping(member):
        yield from _members(arguments[-1])
    elif isinstance(part, int):
        yield from _members(arguments[min(part, len(arguments) - 1)])


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    members: list[Any] = [model]
    for part in path:
        members = [inner for member in members for inner in _inside(member, part)]
    return [member for member in members if _is_model(member)]


def _fits(member: type[BaseModel], data: Any) -> bool:
    """False when `data` has another value where `member` has a literal, as its `kind`."""
    values = data if isinstance(data, dict) else {}
    return all(
        key not in values or not (literals := _literals(field)) or values[key] in literals
        for key, field in member.model_fields.items()
    )


def _literals(field: FieldInfo) -> tuple[Any, ...]:
    members = _members(field.annotation)
    return tuple(value for one in members if get_origin(one) is Literal for value in get_args(one))


def _has(data: Any, part: str | int) -> bool:
    return part in data if isinstance(data, dict) else isinstance(part, int) and part < len(data)


def _walk(
    annotation: Any, path: str, above: tuple[type[BaseModel], ...]
) -> Iterator[tuple[str, str]]:
    for member in _members(annotation):
        if _is_model(member):
            if member in above:  # a model may hold itself
                continue
            for key, field in member.model_fields.items():
                here = f"{path}.{key}" if path else key
                yield key, here
                yield from _walk(field.annotation, here, (*above, member))
        else:
            for argument in get_args(member):
                yield from _walk(argument, f"{path}[]", above)


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _is_mapping(member: Any) -> bool:
    kind = get_origin(member) or member
    return isinstance(kind, type) and issubclass(kind, Mapping)
