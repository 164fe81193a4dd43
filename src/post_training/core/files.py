"""Files that are either complete or absent: written beside their place, then renamed into it."""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step; on any failure the old file stays as it was."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and becomes `path`.

    Its permissions are those of any new file there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with _new_file(temporary) as file:
        mode = stat.S_IMODE(os.fstat(file).st_mode)
    try:
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # A library put a file of its own there.
            temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, else it is removed.

    Its permissions, and those of all files in it, are those of any new one there.
    Errors: FileExistsError when `path` already exists and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush all of it to the disk, with the permissions that new files get there.

    Libraries write a file beside its place first, which then stays private (0600).
    """
    mode = new_file_mode(folder)
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
        if path.is_file() or path.is_dir():
            sync(path)


def new_file_mode(folder: Path) -> int:
    """Of a file that is made there: as the umask says, or the folder's default ACL, which alone the
    file system knows."""
    probe = _beside(folder / "mode")
    with _new_file(probe) as file:
        probe.unlink()
        return stat.S_IMODE(os.fstat(file).st_mode)


def copy_folder(source: Path, target: Path, *, without: Iterable[str] = ()) -> None:
    """The content of its files, into an existing folder, without their permissions and times.

    without: names to leave out.
    """
    for path in sorted(source.iterdir()):
        if path.name in without:
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            copy_folder(path, target / path.name, without=without)
        else:
            shutil.copyfile(path, target / path.name)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Open for writing; with all the permissions that there may be, unlike tempfile's."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
