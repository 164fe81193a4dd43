"""Files that are either complete or absent: written beside their place, then renamed into it.

Also: JSON records, permissions of new files, and flushing to the disk.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError

_SPECIAL_FILES = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step; on any failure the old file stays as it was."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is flushed and becomes `path`.

    Its permissions are those of any new file there: as the umask or the folder's ACL says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with _new_file(temporary) as file:
        mode = stat.S_IMODE(os.fstat(file).st_mode)
    try:
        yield temporary
        # A library may have renamed a private file of its own (0600) to this path.
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
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


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one step; keys in the order given, since people read these files."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """Read a record that `write_json` wrote.

    schema: what its key "schema" must be.
    Errors: UsageError for any other file; FileNotFoundError.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"not a JSON record: {error}", where=str(path)) from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found != schema:
        raise UsageError(f"schema is {found!r}, not {schema!r}", where=str(path))
    return record


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object that others wrote. Errors: PostTrainingError for anything else;
    FileNotFoundError."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise PostTrainingError(f"malformed JSON: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        problem = f"must be a JSON object (got {type(found).__name__})"
        raise PostTrainingError(problem, where=str(path))
    return found


def check_keys(record: Mapping[str, Any], keys: Iterable[str], path: Path) -> None:
    """Errors: UsageError that names the keys which the record at `path` lacks."""
    if missing := [key for key in keys if key not in record]:
        raise UsageError(f"no record any more: {', '.join(missing)} is gone", where=str(path))


def copy_folder(source: Path, target: Path, *, without: Iterable[str] = ()) -> None:
    """Copy the content of all files into an existing folder; not their permissions and times.

    without: names of files and folders to leave out, at every level.
    """
    for path in sorted(source.iterdir()):
        if path.name in without:
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            copy_folder(path, target / path.name, without=without)
        else:
            shutil.copyfile(path, target / path.name)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush every file and folder in it to the disk; all files get the permissions of new ones.

    Libraries also write beside and rename, and leave such files private (0600).
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
    """The permissions of a file that is made in `folder`, by its umask or its default ACL.

    A file is made to find out: only the file system knows what a default ACL comes to.
    """
    probe = _beside(folder / "mode")
    with _new_file(probe) as file:
        probe.unlink()
        return stat.S_IMODE(os.fstat(file).st_mode)


def refuse_special_file(path: Path) -> None:
    """Errors: UsageError for a pipe, a socket or a device: reading one may never end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return
    if kind in _SPECIAL_FILES:
        raise UsageError(f"must be a file or a folder (is {_SPECIAL_FILES[kind]})", where=str(path))


def parse_mount_table(mount_table: str) -> list[tuple[str, str]]:
    """(where, type of the file system) of each mount, in the order they were made.

    mount_table: the text of /proc/self/mountinfo.
    """
    mounts = []
    for line in mount_table.splitlines():
        place, kind = line.split()[4], line.partition(" - ")[2].split()[:1]
        # The kernel writes a space as \040.
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)
        mounts.append((place, kind[0] if kind else "unknown"))
    return mounts


def user_cache() -> Path:
    """`post-training` in the user's cache folder; what is there may be deleted at any time."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "post-training")


def user_config(environment: Mapping[str, str] = os.environ) -> Path:
    """`post-training` in the user's folder of settings: what a user wrote, and keeps."""
    home = environment.get("HOME") or os.path.expanduser("~")
    return Path(environment.get("XDG_CONFIG_HOME") or f"{home}/.config", "post-training")


def remove_leftovers(run_dir: Path, *names: str) -> None:
    """Remove what a killed attempt was writing beside `names`, and had not yet renamed to them."""
    for name in names:
        for leftover in run_dir.glob(f".{name}.*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that nobody else uses."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Make a file and open it for writing. Unlike tempfile's it is not private: its permissions are
    those that the umask or the folder's ACL leaves."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
