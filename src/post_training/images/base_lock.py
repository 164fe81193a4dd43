"""containers/NAME/base.lock: the bootstrapped base that is expected, by content.

Debian's mirrors keep only the newest versions, so a base can not always be made again. The lock
says which bytes are meant (sha256), which package versions are in them, and from which time on a
snapshot service has them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.core.files import read_json, write_json

LOCK_NAME = "base.lock"
_SCHEMA = "post-training/base-lock/1"


@dataclass(frozen=True)
class BaseLock:
    """include: the recipe's package list. packages: {name: version} of all that is in the base.
    snapshot: when it was made, as a snapshot service names times. mmdebstrap: what made it."""

    sha256: str
    suite: str
    epoch: int
    include: list[str]
    snapshot: str
    mmdebstrap: str
    packages: dict[str, str]


def read_base_lock(path: Path, *, suite: str, epoch: int, include: list[str]) -> BaseLock:
    """Errors: UsageError when there is none, or it is of another suite, time or package list."""
    try:
        entries = read_json(path, _SCHEMA)
    except FileNotFoundError:
        raise UsageError("the base is not locked", where=str(path), hint=_hint(path)) from None
    entries.pop("schema")
    try:
        lock = BaseLock(**entries)
    except TypeError:
        raise UsageError("not a lock of a base", where=str(path), hint=_hint(path)) from None
    for name, wanted in {"suite": suite, "epoch": epoch, "include": include}.items():
        if (found := getattr(lock, name)) != wanted:
            raise UsageError(
                f"{name} is {_text(found)}, the recipe asks for {_text(wanted)}",
                where=str(path),
                hint=_hint(path),
            )
    return lock


def locked_bases(repository: Path) -> list[str]:
    """The sha256 of every bootstrapped base that a recipe's base.lock names."""
    paths = sorted(repository.glob(f"containers/*/{LOCK_NAME}"))
    locks = [json.loads(path.read_text()) for path in paths]
    # A registry's base is not in the store.
    return [lock["sha256"] for lock in locks if lock["schema"] == _SCHEMA]


def write_base_lock(path: Path, lock: BaseLock) -> None:
    write_json(path, {"schema": _SCHEMA, **asdict(lock)})


def moved_packages(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """`name 1.0 -> 1.1` for every package whose version is another; absent ones are `-`."""
    return [
        f"{name} {expected.get(name, '-')} -> {found.get(name, '-')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def _text(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _hint(path: Path) -> str:
    return f"`post-training image lock {path.parent.name}` writes it"
