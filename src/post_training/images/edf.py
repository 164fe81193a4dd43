"""Read an EDF, the Environment Definition File of CSCS's Container Engine, as that engine does.

The rules: https://docs.cscs.ch/software/container-engine/edf, and the parser and schema of
https://github.com/sarus-suite/raster. Where the two differ we accept both; `entrypoint` defaults to
false, as documented. What only one of them expands (`$NAME` without braces) is refused.

`${NAME}` is a variable of the host; in [env] it is the image's own where the image has one, so that
`PATH = "${PATH}:/more"` adds to the image's PATH. An empty value in [env] unsets the variable, in
the image too.

Standard library only: this is read at the start of every process of a job.
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.images.reference import is_reference

# Of base_environment. Ten levels of two parents each are a thousand files.
_MAX_LEVELS = 10
_MAX_FILES = 100
_KEYS = {
    "base_environment": (str, list),
    "image": str,
    "workdir": str,
    "entrypoint": bool,
    "writable": bool,
    "mounts": list,
    "devices": list,
    "env": dict,
    "annotations": dict,
}
_PROPAGATION = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
# Of a mount.
# Of Singularity's alone: the source is an image file, and this folder in it is mounted.
IMAGE_SOURCE = "image-src=/"
_FLAGS = {"ro", "rw", "bind", "rbind", "nosuid", "nodev", "noexec", "sqsh", *_PROPAGATION}
# `$NAME` or `${…}`; groups: the second `$` of an escaped one, what is in the braces, NAME.
_VARIABLE = re.compile(r"\$(\$?)(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_NOT_ALLOWED = re.compile(r'\$\(|`|;|"')
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
# Built from the host's value, these would hide what the image has there.
_IMAGE_PATHS = ("PATH", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Mount:
    """`source:target[:flag+flag]`, both absolute; `sqsh`: the source is a squashfs to mount."""

    source: Path
    target: Path
    flags: frozenset[str] = frozenset()

    def __str__(self) -> str:
        words = [str(self.source), str(self.target)]
        return ":".join([*words, "+".join(sorted(self.flags))] if self.flags else words)


@dataclass(frozen=True)
class Edf:
    """An EDF, merged with its parents and expanded.

    env: an empty value unsets the variable. annotations: by dotted keys.
    """

    path: Path
    image: str
    workdir: str | None
    entrypoint: bool
    writable: bool
    mounts: tuple[Mount, ...]
    devices: tuple[str, ...]
    env: dict[str, str]
    annotations: dict[str, str]


def find_edf(name: str, env: Mapping[str, str], cwd: Path) -> Path:
    """The file that `--environment=NAME` means.

    A path (absolute, or relative to `cwd`) is taken as it is; NAME is NAME.toml in a folder of
    EDF_PATH (default ~/.edf); a bare NAME.toml is looked for in `cwd`, then in EDF_PATH.
    """
    if "/" in name:
        path = cwd / name
        if path.is_file():
            return path
        raise UsageError("no such EDF", where=str(path))
    searched = edf_folders(env)
    candidates = [
        folder / (name if name.endswith(".toml") else f"{name}.toml") for folder in searched
    ]
    if name.endswith(".toml"):
        candidates.insert(0, cwd / name)
    for path in candidates:
        if path.is_file():
            return path
    places = ", ".join(str(path.parent) for path in candidates) or "EDF_PATH, which is empty"
    raise UsageError(
        f"no EDF {name!r} in {places}",
        hint="`make push-sqsh` writes post-training.toml and links it into ~/.edf",
    )


def edf_folders(env: Mapping[str, str]) -> list[Path]:
    """The folders of EDF_PATH; without it, ~/.edf."""
    if env.get("EDF_PATH"):
        folders = [Path(word) for word in env["EDF_PATH"].split(":") if word]
        if relative := [str(folder) for folder in folders if not folder.is_absolute()]:
            raise UsageError(f"EDF_PATH: must hold absolute folders (got {', '.join(relative)})")
        return folders
    home = env.get("HOME") or os.path.expanduser("~")
    return [Path(home) / ".edf"]


def load_edf(
    path: Path, env: Mapping[str, str], cwd: Path, *, sources_are_here: bool = True
) -> Edf:
    """Read an EDF, merge it with its parents, expand and check it.

    env: the host's environment, for `${VAR}`. cwd: what relative paths are relative to.
    sources_are_here: whether the sources of its mounts must exist on this machine.
    Errors: ConfigError with every fault, each as `file: key: what`.
    """
    edf, faults = examine_edf(path, env, cwd, sources_are_here=sources_are_here)
    if faults:
        raise ConfigError(faults)
    return edf


def examine_edf(
    path: Path, env: Mapping[str, str], cwd: Path, *, sources_are_here: bool = True
) -> tuple[Edf, list[str]]:
    """As `load_edf`; (what could be read, every fault)."""
    faults: list[str] = []
    merged = _Merger(env, cwd, faults).merge(path)
    variables = merged.pop("env", {})
    expanded = expand_values(merged, env, str(path), faults)
    variables = expand_env(variables, expanded.get("image", ""), env, cwd, path, faults)
    mounts = []
    for index, text in enumerate(expanded.get("mounts", [])):
        try:
            mount = parse_mount(text, cwd)
        except ValueError as error:
            faults.append(f"{path}: mounts[{index}]: {error}")
            continue
        if sources_are_here and not mount.source.exists():
            faults.append(f"{path}: mounts[{index}]: source does not exist: {mount.source}")
        mounts.append(mount)
    image = expanded.get("image", "")
    if not image:
        faults.append(f"{path}: image: missing")
    edf = Edf(
        path=path,
        image=image,
        workdir=expanded.get("workdir"),
        entrypoint=expanded.get("entrypoint", False),
        writable=expanded.get("writable", True),
        mounts=tuple(dict.fromkeys(mounts)),
        devices=tuple(dict.fromkeys(expanded.get("devices", []))),
        env=variables,
        annotations=expanded.get("annotations", {}),
    )
    return edf, faults


def merge_edf(path: Path, env: Mapping[str, str], cwd: Path) -> dict[str, Any]:
    """The keys of an EDF and its parents, merged and not expanded; annotations by dotted keys.

    Errors: ConfigError with every fault.
    """
    faults: list[str] = []
    merged = _Merger(env, cwd, faults).merge(path)
    expand_values(merged, EverySet(), str(path), faults)
    if faults:
        raise ConfigError(faults)
    return merged


def parse_mount(text: str, cwd: Path) -> Mount:
    """Parse `SRC:DST[:FLAGS]`, or one path that is both. Errors: ValueError.

    Flags are joined by `+`, as CSCS's engine of today wants them, or by `,`, as its successor does.
    """
    parts = text.split(":")
    source = parts[0]
    target = parts[1] if len(parts) > 1 else source
    if len(parts) > 3 or not source or not target:
        where = "; a folder with a colon in its name can't be mounted" if len(parts) > 3 else ""
        raise ValueError(f"must be SRC:DST[:FLAGS] (got {text!r}){where}")
    flags = frozenset(word for part in parts[2:] for word in re.split("[+,]", part) if word)
    if unknown := sorted(flags - _FLAGS - {w for w in flags if w.startswith(IMAGE_SOURCE)}):
        raise ValueError(f"unknown flag {unknown[0]!r} (known: {', '.join(sorted(_FLAGS))})")
    if "sqsh" in flags and len(flags) > 1:
        raise ValueError("the flag sqsh stands alone")
    if not target.startswith("/") or os.path.normpath(target) == "/":
        where = "; is it ${PWD}? Start the command in another folder" if target == "/" else ""
        raise ValueError(f"target must be an absolute path below / (got {target!r}){where}")
    return Mount(Path(os.path.normpath(cwd / source)), Path(os.path.normpath(target)), flags)


def expand(text: str, env: Mapping[str, str]) -> str:
    """Expand `${VAR}` and `${VAR:-default}`; `$${VAR}` and `$$VAR` give a literal `${VAR}`, `$VAR`.

    Errors: ValueError for an undefined variable, and for what not every engine expands.
    """
    if "\0" in text:
        raise ValueError(f"holds a NUL character (got {text!r})")
    if found := _NOT_ALLOWED.search(text):
        raise ValueError(f"{found[0]!r} is not allowed in an EDF (got {text!r})")

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        if match[3]:
            raise ValueError(f"{match[0]!r} is not expanded by every engine: write ${{{match[3]}}}")
        name = _NAME.fullmatch(match[2])
        if name is None:
            raise ValueError(f"cannot expand {match[0]!r}")
        if name[2] is not None and "$" in name[2]:
            raise ValueError(f"a default can't hold a variable (got {match[0]!r})")
        # As in a shell, the default of `:-` also replaces an empty value.
        found = env.get(name[1])
        if name[2] is not None:
            return found or name[2]
        if found is None:
            raise ValueError(f"undefined variable {name[1]}")
        return found

    return _VARIABLE.sub(value, text)


def escape(text: str) -> str:
    """Write `text` so that `expand` gives it back."""
    return re.sub(r"\$(?=[{A-Za-z_])", "$$", text)


def fill_in_variables(text: str, env: Mapping[str, str]) -> str:
    """`text` with the variables of `env` filled in; all others are left for `expand`."""

    def value(match: re.Match[str]) -> str:
        name = None if match[1] or match[2] is None else _NAME.fullmatch(match[2])
        return escape(env[name[1]]) if name and env.get(name[1]) else match[0]

    return _VARIABLE.sub(value, text)


def expand_values(
    data: Any, env: Mapping[str, str], where: str, faults: list[str], key: str = ""
) -> Any:
    """`data` with every string expanded. A string that can't be is left, and is a fault.

    where: the file, for `faults`, to which faults are added. key: of `data` in the file.
    """
    if isinstance(data, dict):
        return {
            name: expand_values(value, env, where, faults, f"{key}.{name}" if key else name)
            for name, value in data.items()
        }
    if isinstance(data, list):
        return [expand_values(v, env, where, faults, f"{key}[{i}]") for i, v in enumerate(data)]
    if not isinstance(data, str):
        return data
    try:
        return expand(data, env)
    except ValueError as error:
        faults.append(f"{where}: {key}: {error}")
        return data


def expand_env(
    variables: dict[str, str],
    image: str,
    env: Mapping[str, str],
    cwd: Path,
    path: Path,
    faults: list[str],
) -> dict[str, str]:
    """[env], expanded from the image's own variables and the host's; the image's come first.

    image: the EDF's. path: of the EDF. faults: to which faults are added.
    """
    used = {
        name[1]
        for value in variables.values()
        for match in _VARIABLE.finditer(value)
        if not match[1] and match[2] and (name := _NAME.fullmatch(match[2]))
    }
    found: dict[str, str] = {}
    if used and image:
        try:
            if is_reference(image):
                raise PostTrainingError("it is in a registry")
            found = _read_variables_in(cwd / image, variables)
        except PostTrainingError as error:
            faults += [
                f"{path}: env: {name}: what the image has there cannot be read: {error.problem}"
                for name in sorted(used & set(_IMAGE_PATHS))
            ]
    return expand_values(variables, {**env, **found}, str(path), faults, "env")


def read_image_variables() -> dict[str, str]:
    """The variables that the image sets in which this process runs."""
    path = Path("/etc/environment")
    return parse_environment(path.read_text()) if path.exists() else {}


def _read_variables_in(image: Path, pins: Mapping[str, str]) -> dict[str, str]:
    """The variables that an image file sets: from the squashfs, or from a SIF's record.

    Errors: PostTrainingError where they cannot be read.
    """
    if image.suffix == ".sif":
        record = image.with_name(f"sha256-{pins.get('POST_TRAINING_IMAGE_SQSH_SHA256')}.json")
        try:
            return dict(json.loads(record.read_text())["environment"])
        except (OSError, ValueError, KeyError, TypeError):
            raise PostTrainingError(f"no record of the SIF's variables in {record}") from None
    if not image.is_file():
        return {}  # None: the caller checks that.
    if shutil.which("unsquashfs") is None:
        raise PostTrainingError("unsquashfs is not installed (squashfs-tools)")
    done = subprocess.run(
        ["unsquashfs", "-cat", str(image), "etc/environment"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return parse_environment(done.stdout.decode(errors="replace"))


def parse_environment(text: str) -> dict[str, str]:
    """{name: value} from an image's /etc/environment, where enroot and our Dockerfiles put ENV."""
    lines = text.splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


class EverySet(dict[str, str]):
    """An environment in which every variable is set: what can't be expanded in it, no engine can
    expand anywhere."""

    def get(self, key: str, default: Any = None) -> str:
        return "x"


class _Merger:
    """Reads a file and its parents; adds every fault to `faults`."""

    def __init__(self, env: Mapping[str, str], cwd: Path, faults: list[str]):
        self._env, self._cwd, self._faults = env, cwd, faults
        self._num_files = 0

    def merge(self, path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
        """The file's keys over its parents': scalars and table entries replace, lists append."""
        resolved = path.resolve()
        if resolved in chain:
            cycle = " -> ".join(link.name for link in (*chain, resolved))
            raise UsageError(f"base_environment goes in a circle: {cycle}", where=str(path))
        if len(chain) > _MAX_LEVELS:
            raise UsageError(f"base_environment: more than {_MAX_LEVELS} levels", where=str(path))
        self._num_files += 1
        if self._num_files > _MAX_FILES:
            raise UsageError(f"base_environment: more than {_MAX_FILES} files", where=str(path))
        own = _read(path, self._faults)
        parents = own.pop("base_environment", [])
        merged: dict[str, Any] = {}
        for name in [parents] if isinstance(parents, str) else parents:
            try:
                expanded = expand(name, self._env)
            except ValueError as error:
                self._faults.append(f"{path}: base_environment: {error}")
                continue
            if expanded:  # Empty is the documented default.
                parent = find_edf(expanded, self._env, self._cwd)
                _merge_over(merged, self.merge(parent, (*chain, resolved)))
        _merge_over(merged, own)
        return merged


def _merge_over(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Change `below`: scalars and table entries of `above` replace its own, lists are appended."""
    for key, value in above.items():
        if isinstance(value, dict):
            below[key] = {**below.get(key, {}), **value}
        elif isinstance(value, list):
            below[key] = [*below.get(key, []), *value]
        else:
            below[key] = value


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    """One file's known keys, annotations by dotted keys; what is wrong is added to `faults`."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such EDF", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from None
    except RecursionError:
        raise UsageError("not valid TOML: nested too deeply", where=str(path)) from None
    known: dict[str, Any] = {}
    for key, value in data.items():
        if key not in _KEYS:
            faults.append(f"{path}: {key}: unknown key{_nearest(key)}")
        elif not isinstance(value, _KEYS[key]):
            faults.append(f"{path}: {key}: must be a {_type_name(key)} (got {value!r})")
        elif isinstance(value, list) and (wrong := [v for v in value if not isinstance(v, str)]):
            faults.append(f"{path}: {key}: every item must be a string (got {wrong[0]!r})")
        else:
            known[key] = value
    if "annotations" in known:
        known["annotations"] = _flatten(known["annotations"])
    if "env" in known:
        known["env"] = _strings(known["env"], path, faults)
    return known


def _strings(variables: Mapping[str, Any], path: Path, faults: list[str]) -> dict[str, str]:
    """The entries of [env] that can be variables; the others are added to `faults`."""
    strings = {}
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name:
            faults.append(f"{path}: env: {name!r} cannot be the name of a variable")
        elif not isinstance(value, str):
            faults.append(f"{path}: env.{name}: must be a string (got {value!r})")
        else:
            strings[name] = value
    return strings


def _nearest(key: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key, _KEYS, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _type_name(key: str) -> str:
    kind = _KEYS[key]
    names = {str: "string", list: "list", bool: "boolean", dict: "table"}
    return names[kind] if isinstance(kind, type) else " or ".join(names[k] for k in kind)


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return flat
