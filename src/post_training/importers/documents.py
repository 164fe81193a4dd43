"""The files of other trainers: YAML or JSON, with OmegaConf's `${…}` and Hydra's groups.

Hydra composes a configuration of several files. What is read here of it is what such projects
use: the list `defaults` with files beside, groups (folders) and `_self_`; `# @package _global_`;
`group=name` and `key=value` on the command line; `${key}` in values.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from post_training.config.load import merge, parse_override, set_override
from post_training.core import yaml
from post_training.core.errors import UsageError, dotted

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_MOST_ROUNDS = 20
_GLOBAL = "# @package _global_"


def read_document(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a file, and {dotted key: file and line}. Errors: UsageError."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise UsageError("is a folder, not a file", where=str(path)) from None
    if path.suffix == ".json":
        try:
            data, lines = json.loads(text), {}
        except ValueError as error:
            raise UsageError(f"malformed JSON: {error}", where=str(path)) from None
    else:
        document = yaml.load(yaml.decode(text, str(path)), str(path))
        data = document.data
        lines = {dotted(key): document.where(key) for key in document.lines}
    if not isinstance(data, dict):
        raise UsageError("must be a mapping at the top level", where=str(path))
    return data, lines


def read_with_references(
    paths: Sequence[Path], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Files over each other, then `key=value`, then `${key}` replaced. Errors: UsageError."""
    data: dict[str, Any] = {}
    where: dict[str, str] = {}
    for path in paths:
        own, lines = read_document(path)
        data, where = merge(data, own), where | lines
    for text in overrides:
        set_override(data, parse_override(text))
        where[text.partition("=")[0]] = f"'{text}'"
    return resolve(data), where


def compose(main: Path, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Hydra's way: `main` with what its `defaults` name, and the words of the command line.

    words: `group=name` where there is a folder `group` beside `main`; else `key=value`.
    Errors: UsageError.
    """
    folder = main.parent
    groups, overrides = {}, []
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("+~")
        if not equals:
            raise UsageError("must be key=value or group=name", where=repr(word))
        if (folder / name).is_dir():
            groups[name] = value
        else:
            overrides.append(f"{name}={value or 'null'}")
    data, where = _composed(main, groups, set())
    unused = set(groups) - where.keys()
    for name in sorted(unused):
        own, lines = _group(folder, name, groups[name])
        data, where = merge(data, own), where | lines
    for text in overrides:
        set_override(data, parse_override(text))
        where[text.partition("=")[0]] = f"'{text}'"
    return resolve(data), where


def _composed(
    path: Path, groups: dict[str, str], above: set[Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    if path in above:
        raise UsageError("its defaults include the file itself", where=str(path))
    own, own_lines = read_document(path)
    data: dict[str, Any] = {}
    where: dict[str, str] = {}
    defaults = own.pop("defaults", [])
    if "_self_" not in defaults:
        defaults = [*defaults, "_self_"]
    for entry in defaults:
        if entry == "_self_":
            found, lines = own, own_lines
        elif isinstance(entry, str):
            found, lines = _composed(path.parent / f"{entry}.yaml", groups, above | {path})
        else:
            name, value = next(iter(entry.items()))
            is_optional = name.startswith("optional ")
            name = name.removeprefix("optional ").removeprefix("override ")
            value = groups.get(name, value)
            where[name] = f"{path}: defaults"
            if value in (None, "none") and not (path.parent / name / "none.yaml").is_file():
                continue
            if is_optional and not (path.parent / name / f"{value}.yaml").is_file():
                continue
            found, lines = _group(path.parent, name, value)
        data, where = merge(data, found), where | lines
    return data, where


def _group(folder: Path, name: str, value: str) -> tuple[dict[str, Any], dict[str, str]]:
    path = folder / name / f"{value}.yaml"
    if not path.is_file():
        there = sorted(each.stem for each in (folder / name).glob("*.yaml"))
        raise UsageError(
            f"no such file: {path}", where=f"{name}={value}", hint=f"there are: {', '.join(there)}"
        )
    data, lines = read_document(path)
    is_global = path.read_text().lstrip().startswith(_GLOBAL)
    if is_global:
        return data, {name: str(path), **lines}
    return {name: data}, {name: str(path), **{f"{name}.{key}": at for key, at in lines.items()}}


def resolve(data: dict[str, Any]) -> dict[str, Any]:
    """`${a.b}` replaced by the value of a.b; what a resolver gives (`${now:…}`) becomes nothing,
    but for Hydra's working folder. Errors: UsageError for a key that is not there, or a circle."""
    for _ in range(_MOST_ROUNDS):
        changed, found = _resolved(data, data)
        if not found:
            return changed
        data = changed
    raise UsageError("a ${…} refers to itself")


def _resolved(value: Any, root: dict[str, Any]) -> tuple[Any, bool]:
    if isinstance(value, dict):
        pairs = {key: _resolved(each, root) for key, each in value.items()}
        return {k: each for k, (each, _) in pairs.items()}, any(f for _, f in pairs.values())
    if isinstance(value, list):
        items = [_resolved(each, root) for each in value]
        return [each for each, _ in items], any(found for _, found in items)
    if not isinstance(value, str) or not (match := _REFERENCE.search(value)):
        return value, False
    if match.span() == (0, len(value)):
        return _value_of(match[1], root), True
    replaced = _value_of(match[1], root)
    text = "" if replaced is None else str(replaced)
    return value[: match.start()] + text + value[match.end() :], True


def _value_of(name: str, root: dict[str, Any]) -> Any:
    if name in ("hydra:runtime.cwd", "oc.env:PWD"):
        return "."
    if ":" in name or name.startswith("hydra."):
        return None
    here: Any = root
    for part in name.split("."):
        if not isinstance(here, dict) or part not in here:
            raise UsageError(f"${{{name}}}: there is no such key")
        here = here[part]
    return here
