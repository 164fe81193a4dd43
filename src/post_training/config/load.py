"""A YAML file and overrides become a checked configuration; every fault is told at once.

    defaults of the model < what the file extends, in order < the file < overrides, in order

`extends: [shared.yaml, preset:lumi-30b]` may stand at the top of any file; paths are relative to
that file. Mappings merge key by key; lists and scalars replace what was there.

An override is `key.path[0].name=value`. The value is YAML, read by the loader that reads the files:
`lr=5e-7` is a number, `name=no` is text, `stages=[sft, dpo]` a list, `path=null` nothing. It
replaces what was there, mappings too. A list grows by one when the index is its length.

Values have the type YAML gave them: '3' and 3.0 are no integers, 1 is not true. An integer is a
number, and text becomes a path.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from post_training.config.faults import describe_wrong_settings, explain, nearest
from post_training.core import yaml
from post_training.core.errors import ConfigError, KeyPath, UsageError, dotted, shown
from post_training.core.secrets import find_secret, redact

PRESETS_DIR = Path(__file__).parent / "presets"
MAX_LEVELS = 10
# Of 64 bits, in which numpy and torch count.
_LARGEST_INTEGER = 2**63 - 1
_NAME = re.compile(r"(?P<name>[^.\[\]\s]+)(?P<indices>(?:\[[0-9]+\])*)")

ConfigT = TypeVar("ConfigT", bound=BaseModel)


@dataclass(frozen=True)
class Override:
    """`text` is what the person wrote; messages quote it in place of a file and line."""

    text: str
    path: KeyPath
    value: Any

    @property
    def where(self) -> str:
        return _where(self.text)


@dataclass(frozen=True)
class Layer:
    """Settings, and where each was written: path -> `file.yaml:12`."""

    data: dict[str, Any]
    origins: dict[KeyPath, str]

    def under(self, top: "Layer") -> "Layer":
        """Both, with the values of `top` where both have one."""
        return Layer(merge(self.data, top.data), self.origins | top.origins)

    def set(self, override: Override) -> None:
        """Set the value in place; whatever is below it now comes from the override."""
        set_override(self.data, override)
        length = len(override.path)
        for path in [path for path in self.origins if path[:length] == override.path]:
            del self.origins[path]
        for depth in range(1, length + 1):
            self.origins.setdefault(override.path[:depth], override.where)

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path`, or else the nearest one above it, was written."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def copied(self) -> "Layer":
        """One whose settings can be set without changing these."""
        return Layer(copy.deepcopy(self.data), dict(self.origins))

    def section(self, path: KeyPath) -> "Layer":
        """The mapping at `path` as a layer of its own, which shares its data with this one."""
        data: Any = self.data
        for part in path:
            data = data[part]
        origins = {
            key[len(path) :]: where
            for key, where in self.origins.items()
            if key[: len(path)] == path
        }
        return Layer(data, {(): self.origin(path), **origins})

    def with_texts(self, replace: Callable[[str, KeyPath], str]) -> "Layer":
        """With every text value replaced by `replace(text, its path)`."""

        def replaced(value: Any, path: KeyPath) -> Any:
            if isinstance(value, dict):
                return {key: replaced(below, (*path, key)) for key, below in value.items()}
            if isinstance(value, list):
                return [replaced(below, (*path, index)) for index, below in enumerate(value)]
            return replace(value, path) if isinstance(value, str) else value

        return Layer(replaced(self.data, ()), self.origins)


def load_config(model: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` with what it extends, apply the overrides and check the result.

    Errors: ConfigError with every fault, each as `file.yaml:12: key: what is wrong`.
    """
    return check_layer(model, read_layer(path, overrides))


def load_overrides(model: type[ConfigT], overrides: Sequence[str]) -> ConfigT:
    """As `load_config`, of a command line that names no file. Errors: ConfigError."""
    layer = Layer({}, {(): "command line"})
    _apply(layer, overrides)
    return check_layer(model, layer)


def read_layer(path: Path, overrides: Sequence[str] = ()) -> Layer:
    """`path` with what it extends and the overrides, unchecked. Errors: ConfigError."""
    try:
        layer = _read(str(path), path, {})
    except UsageError as error:
        raise ConfigError([str(error)]) from None
    layer.origins[()] = str(path)
    _apply(layer, overrides)
    return layer


def read_section(layer: Layer, file: Path) -> Layer:
    """A section of `file` over everything that its own `extends` names, as for a file.

    Errors: ConfigError.
    """
    try:
        whole = _read_extended(layer, str(file), file, {})
    except UsageError as error:
        raise ConfigError([str(error)]) from None
    whole.origins[()] = layer.origins[()]
    return whole


def check_layer(model: type[ConfigT], layer: Layer) -> ConfigT:
    """Errors: ConfigError with every fault, each as `file.yaml:12: key: what is wrong`; a secret
    before all else, since a configuration is copied, recorded and shown."""
    if faults := list(_secrets(layer, layer.data, ())):
        raise ConfigError(
            faults,
            hint="a token belongs in a file of ~/.config/post-training/credentials (mode 0600), "
            "which a run finds by its path; if this one was shared, make a new one",
        )
    try:
        # From JSON, strict still takes text for paths, and lists for tuples.
        config = model.model_validate_json(json.dumps(layer.data), strict=True)
    except ValidationError as error:
        raise ConfigError(
            explain(model, error, layer.data, layer.origin),
            hint=describe_wrong_settings(model, error, layer.data),
        ) from None
    if faults := list(_beyond_limits(layer, layer.data, ())):
        raise ConfigError(faults)
    return config


def _beyond_limits(layer: Layer, value: Any, path: KeyPath) -> Iterator[str]:
    """A line for each value that no library and no file system takes."""
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _beyond_limits(layer, below, (*path, key))
    elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        where = f"{layer.origin(path)}: {dotted(path)}"
        yield f"{where}: must be <= {_LARGEST_INTEGER} (got {shown(value, limit=40)})"
    elif isinstance(value, str) and "\0" in value:
        yield f"{layer.origin(path)}: {dotted(path)}: holds a NUL character (got {shown(value)})"


def _secrets(layer: Layer, value: Any, path: KeyPath) -> Iterator[str]:
    """A line for each key or text that holds one; never its value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in items:
            if isinstance(key, str) and (kind := find_secret(key)):
                name = dotted(path) or "the top level"
                yield f"{layer.origin(path)}: a key below {name} holds a secret ({kind})"
            else:
                yield from _secrets(layer, below, (*path, key))
    elif isinstance(value, str) and (kind := find_secret(value)):
        yield f"{layer.origin(path)}: {dotted(path)}: holds a secret ({kind})"


def resolved_yaml(config: BaseModel) -> str:
    """The whole configuration, defaults written out; loading it gives an equal one."""
    return yaml.dump(config.model_dump(mode="json"))


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings key by key, anything else replaced. Neither is changed."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict):
            below = base.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _apply(layer: Layer, overrides: Sequence[str]) -> None:
    faults = []
    for text in overrides:
        try:
            layer.set(parse_override(text))
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(faults)


def _read(name: str, path: Path, above: dict[Path, str]) -> Layer:
    """The file over everything it extends. `above`: the files that led here, with their names."""
    document = yaml.load(_content(path, name), name)
    if not isinstance(document.data, dict):
        raise UsageError("must be a mapping at the top level", where=name)
    origins = {key: document.where(key) for key in document.lines}
    return _read_extended(Layer(document.data, origins), name, path, above)


def _read_extended(own: Layer, name: str, path: Path, above: dict[Path, str]) -> Layer:
    """`own`, which stands in `path`, over everything it extends."""
    above = {**above, path.resolve(): name}
    layer = Layer({}, {})
    for reference, where in _references(own):
        found, found_name = _find(reference, where, path.parent)
        chain = " -> ".join([*above.values(), found_name])
        if found.resolve() in above:
            raise UsageError(f"extends: goes in a circle: {chain}", where=where)
        if len(above) > MAX_LEVELS:
            raise UsageError(f"extends: more than {MAX_LEVELS} levels: {chain}", where=where)
        layer = layer.under(_read(found_name, found, above))
    settings = {key: value for key, value in own.data.items() if key != "extends"}
    return layer.under(Layer(settings, own.origins))


def _content(path: Path, name: str) -> str:
    try:
        return yaml.decode(path.read_bytes(), name)
    except FileNotFoundError:
        raise UsageError("no such file", where=name) from None
    except IsADirectoryError:
        raise UsageError("is a folder, not a file", where=name) from None


def _references(layer: Layer) -> list[tuple[str, str]]:
    """(file or preset, where it is named) of everything the settings extend, in order."""
    extends = layer.data.get("extends", [])
    items = extends if isinstance(extends, list) else [extends]
    references = []
    for index, reference in enumerate(items):
        where = layer.origin(("extends", index) if items is extends else ("extends",))
        if not isinstance(reference, str) or not reference:
            problem = f"extends: must be a file or preset:name (got {shown(reference)})"
            raise UsageError(problem, where=where)
        references.append((reference, where))
    return references


def _find(reference: str, where: str, folder: Path) -> tuple[Path, str]:
    """The path of what is extended, and its name in messages."""
    if reference.startswith("preset:"):
        preset = reference.removeprefix("preset:")
        known = sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
        if preset not in known:
            near = nearest(preset, known) or f"; known: {', '.join(known)}"
            raise UsageError(f"extends: no preset '{preset}'{near}", where=where)
        return PRESETS_DIR / f"{preset}.yaml", reference
    path = folder / reference
    if not path.exists():
        raise UsageError(f"extends: no such file: {path}", where=where)
    return path, str(path)


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


def write_override(key: str, value: Any) -> str:
    """`key=value`, as parse_override reads it. value: a JSON value."""
    # JSON is YAML: text stays text, whatever it looks like. But for JSON's escapes of characters
    # beyond 16 bits, which are halves of pairs: YAML has none.
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


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
            items = "1 item" if len(here) == 1 else f"{len(here)} items"
            problem = f"{parent} has {items}: index {part} is beyond its end"
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
