"""What goes into an image, and the hash of it.

`containers/NAME/` (Dockerfile, locks, package list), `containers/steps/` (scripts that Dockerfiles
run), `entrypoints/`, `pyproject.toml` and `src/` of one checkout, and the base. The input hash is
over their contents: never a time, a commit or a path, so the same inputs give the same bits. The
build sees these files and nothing else.

A recipe over one of our images has none of our sources: they are in its base.

containers/NAME/recipe.toml says what the image is for:

    platform = "linux/arm64"            of the image
    python = "3.12"                     the interpreter of its environment
    glibc = "2.39"                      the newest manylinux tag that it takes
    base = "REGISTRY/NAME:TAG"          or the name of another recipe, whose image is meant; left
                                        out: bootstrapped from base.packages
    versions_from = "cpu"               prefer the versions in that recipe's locks
    without = ["torchvision"]           never installed: useless, or the base's own

containers/NAME/base.lock says which base is meant: by its digest where it is an image. A
bootstrapped one can't always be made again: Debian's mirrors keep only the newest versions. Its
lock holds the sha256 of its bytes, the package versions in them, and the time from which a snapshot
service has these versions.
"""

import json
import platform
import re
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from post_training import __version__
from post_training.core.errors import ConfigError, UsageError
from post_training.core.files import read_json, write_json
from post_training.core.hashing import sha256_file, sha256_value
from post_training.images.checkout import not_a_checkout

# 2026-01-01. Every file of an image carries this time.
SOURCE_DATE_EPOCH = 1767225600
BASE_LOCK = "base.lock"
# What the distribution of a registry's base lacks: what is asked for, and what that comes to.
SYSTEM_PACKAGES, SYSTEM_LOCK = "system.in", "system.lock"
OWN_BASE_SCHEMA = "post-training/own-base-lock/1"
_BASE_LOCK_SCHEMA = "post-training/base-lock/1"
# Packages that are published as source only, which the Dockerfile builds; and those that were
# compiled on a node (images/compiled.py).
SOURCE_LOCK, COMPILED_LOCK = "source.lock", "compiled.lock"
SETTINGS_NAME = "recipe.toml"
_ARCHITECTURES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
# manylinux tags from before they were named for glibc's version.
_OLD_TAGS = {"x86_64": ("2014", "2010", "1"), "aarch64": ("2014",)}
_FIRST_GLIBC_MINOR = {"x86_64": 5, "aarch64": 17}


@dataclass(frozen=True)
class RecipeSettings:
    """What recipe.toml says; see above."""

    platform: str
    python: str
    glibc: str
    base: str | None = None
    versions_from: str | None = None
    without: tuple[str, ...] = ()

    @property
    def is_over_ours(self) -> bool:
        """Whether the base is another recipe's image; our sources and programs are in it then."""
        return self.base is not None and "/" not in self.base

    @property
    def architecture(self) -> str:
        """The platform's processor as wheels name it: x86_64, aarch64."""
        return _ARCHITECTURES[self.platform]

    @property
    def is_emulated(self) -> bool:
        """Whether this machine runs the image's programs by emulation, if at all."""
        return self.architecture != platform.machine()

    @property
    def wheel_platforms(self) -> list[str]:
        """The platform tags of wheels that run in the image, the newest first."""
        newest, oldest = int(self.glibc.split(".")[1]), _FIRST_GLIBC_MINOR[self.architecture]
        tags = [f"manylinux_2_{minor}" for minor in range(newest, oldest - 1, -1)]
        tags += [f"manylinux{year}" for year in _OLD_TAGS[self.architecture]]
        return [f"{tag}_{self.architecture}" for tag in tags]


@dataclass(frozen=True)
class Recipe:
    """A container recipe of the checkout at `repository`.

    files: {path in the build context: file in the checkout}, all that a build sees of the checkout.
    """

    name: str
    repository: Path
    files: dict[str, Path]
    version: str = __version__

    @property
    def folder(self) -> Path:
        return self.repository / "containers" / self.name

    @cached_property
    def settings(self) -> RecipeSettings:
        return load_settings(self.folder)

    @property
    def locks(self) -> dict[str, Path]:
        return {name: path for name, path in self.files.items() if name.endswith(".lock")}

    @property
    def package_locks(self) -> dict[str, Path]:
        """The locks of Python packages that `image lock` writes."""
        others = (BASE_LOCK, SYSTEM_LOCK, COMPILED_LOCK)
        return {name: path for name, path in self.locks.items() if name not in others}

    def input_hash(self, base_sha256: str) -> str:
        """The image's input hash, given its base: hexadecimal sha256."""
        return _input_hash(self.files, base_sha256)

    def stage(self, context: Path, base_sha256: str) -> str:
        """Copy the files into an empty build context, with modes that do not depend on the umask.

        Returns the input hash of the copies: a file may be edited while a build starts.
        """
        for name, source in self.files.items():
            target = context / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o755 if name.startswith(("entrypoints/", "steps/")) else 0o644)
        for folder in (context, *(path for path in context.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        return _input_hash({name: context / name for name in self.files}, base_sha256)


def load_recipe(name: str, repository: Path) -> Recipe:
    """Errors: UsageError when the checkout holds no such recipe."""
    folder = repository / "containers" / name
    if not (folder / "Dockerfile").is_file():
        known = sorted(path.parent.name for path in repository.glob("containers/*/Dockerfile"))
        if not known:
            raise not_a_checkout(repository)
        raise UsageError(
            f"no container recipe {name!r}",
            where=str(repository / "containers"),
            hint=f"there are: {', '.join(known)}",
        )
    files = {path.name: path for path in _visible_files(folder) if path.suffix != ".md"}
    files |= _tree(repository / "containers/steps", "steps")
    if load_settings(folder).is_over_ours:
        # It also says where the base can be had, which is no part of the image.
        files.pop(BASE_LOCK, None)
    else:
        files |= _tree(repository / "entrypoints", "entrypoints")
        files |= _tree(repository / "src", "project/src")
        files["project/pyproject.toml"] = repository / "pyproject.toml"
    return Recipe(name=name, repository=repository, files=dict(sorted(files.items())))


def load_settings(folder: Path) -> RecipeSettings:
    """Read recipe.toml. Errors: UsageError when there is none; ConfigError with every fault."""
    path = folder / SETTINGS_NAME
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from None
    if faults := [f"{path}: {fault}" for fault in _setting_faults(data)]:
        raise ConfigError(faults)
    return RecipeSettings(**{**data, "without": tuple(data.get("without", ()))})


@dataclass(frozen=True)
class BaseLock:
    """A bootstrapped base, by content.

    sha256: of its tar. suite: Debian's. epoch: SOURCE_DATE_EPOCH. include: the recipe's package
    list. snapshot: when it was made, as a snapshot service names times. mmdebstrap: the version of
    what made it. packages: {name: version} of everything in it.
    """

    sha256: str
    suite: str
    epoch: int
    include: list[str]
    snapshot: str
    mmdebstrap: str
    packages: dict[str, str]


def read_base_lock(path: Path, *, suite: str, epoch: int, include: list[str]) -> BaseLock:
    """Errors: UsageError when there is no lock, or one of another suite, epoch or package list."""
    try:
        entries = read_json(path, _BASE_LOCK_SCHEMA)
    except FileNotFoundError:
        raise UsageError("the base is not locked", where=str(path), hint=_lock_hint(path)) from None
    entries.pop("schema")
    try:
        lock = BaseLock(**entries)
    except TypeError:
        raise UsageError("not a lock of a base", where=str(path), hint=_lock_hint(path)) from None
    for name, wanted in {"suite": suite, "epoch": epoch, "include": include}.items():
        if (found := getattr(lock, name)) != wanted:
            raise UsageError(
                f"{name} is {_show(found)}, the recipe asks for {_show(wanted)}",
                where=str(path),
                hint=_lock_hint(path),
            )
    return lock


def write_base_lock(path: Path, lock: BaseLock) -> None:
    write_json(path, {"schema": _BASE_LOCK_SCHEMA, **asdict(lock)})


def locked_bases(repository: Path) -> list[str]:
    """The sha256 of every base in the store that a recipe's base.lock names: of a bootstrapped one,
    or the OCI digest of one of our images, without its prefix."""
    paths = sorted(repository.glob(f"containers/*/{BASE_LOCK}"))
    locks = [json.loads(path.read_text()) for path in paths]
    # The locks of other bases have other schemas.
    keys = {_BASE_LOCK_SCHEMA: "sha256", OWN_BASE_SCHEMA: "oci_digest"}
    return [
        lock[keys[lock["schema"]]].removeprefix("sha256:")
        for lock in locks
        if lock["schema"] in keys
    ]


def moved_packages(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """`name 1.0 -> 1.1` for every package whose version differs; `-` where there is none."""
    return [
        f"{name} {expected.get(name, '-')} -> {found.get(name, '-')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def _input_hash(files: dict[str, Path], base_sha256: str) -> str:
    contents = {name: sha256_file(path) for name, path in files.items()}
    return sha256_value({"files": contents, "base": base_sha256, "epoch": SOURCE_DATE_EPOCH})


def _tree(folder: Path, prefix: str) -> dict[str, Path]:
    return {f"{prefix}/{path.relative_to(folder)}": path for path in _visible_files(folder)}


def _visible_files(folder: Path) -> list[Path]:
    """Every file below, but hidden ones, bytecode and what an editable install leaves."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".pyc"
        and not any(
            part.startswith(".") or part.endswith(".egg-info")
            for part in path.relative_to(folder).parts
        )
    ]


def _setting_faults(data: dict[str, Any]) -> list[str]:
    known = [field.name for field in fields(RecipeSettings)]
    faults = [f"{key}: unknown key (known: {', '.join(known)})" for key in data if key not in known]
    for key in ("platform", "python", "glibc"):
        if key not in data:
            faults.append(f"{key}: missing")
    for key in known:
        value = data.get(key, "" if key != "without" else [])
        words = value if key == "without" else [value]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            faults.append(f"{key}: must be {'a list of names' if key == 'without' else 'a text'}")
    if faults:
        return faults
    if data["platform"] not in _ARCHITECTURES:
        known_platforms = ", ".join(_ARCHITECTURES)
        faults.append(f"platform: must be one of {known_platforms} (got {data['platform']!r})")
    for key, pattern in (("python", r"3\.\d+"), ("glibc", r"2\.\d+")):
        if not re.fullmatch(pattern, data[key]):
            faults.append(f"{key}: must be like {pattern.replace(chr(92), '')} (got {data[key]!r})")
    return faults


def _show(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _lock_hint(path: Path) -> str:
    return f"`post-training image lock {path.parent.name}` writes it"
