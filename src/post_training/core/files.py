"""Files that are either complete or absent: written beside their place, then renamed into it."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` in one step; on any failure the old file stays as it was."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path, mode=mode) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, else it is removed.

    Errors: FileExistsError when `path` already exists and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented, keys in the order given: a person reads these files too."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """A record written by `write_json` with this `schema`.

    Errors: UsageError for what is no such record; FileNotFoundError.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"not a JSON record: {error}", where=str(path)) from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found != schema:
        raise UsageError(f"schema is {found!r}, not {schema!r}", where=str(path))
    return record


def check_keys(record: Mapping[str, Any], keys: Iterable[str], path: Path) -> None:
    """Errors: UsageError that names the keys which the record at `path` lacks."""
    if missing := [key for key in keys if key not in record]:
        raise UsageError(f"no record any more: {', '.join(missing)} is gone", where=str(path))


_SPECIAL_FILES = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def refuse_special_file(path: Path) -> None:
    """Errors: UsageError for a pipe, a socket or a device, which may be read without an end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return
    if kind in _SPECIAL_FILES:
        raise UsageError(f"must be a file or a folder (is {_SPECIAL_FILES[kind]})", where=str(path))


def user_cache() -> Path:
    """post-training in the user's cache folder: what is there may be deleted at any time."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "post-training")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
