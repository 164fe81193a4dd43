"""`post-training storage repair | touch | clean`: folders that several people use for long.

    repair    give a group its rights back, on all that is there and all that will be
    touch     count as used now, for sites that delete what is unused
    clean     remove what can be made again: caches, and what killed processes left half-written

Only what this user owns can be changed; the rest is counted, by owner. Links are not followed.
"""

import os
import re
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from post_training.core.errors import UsageError, tell
from post_training.core.process import run_tool
from post_training.records.run import is_live
from post_training.records.run_record import RECORD_NAME

_HOUR_S = 3600
# As core/files.py names what it writes beside its place.
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# Below a run folder.
_CACHES = ("cache",)
_SAVING = Path("checkpoints/.saving")


@dataclass
class Touched:
    """What was done in a folder. of_others: {owner: paths that only they can change}."""

    num_paths: int = 0
    of_others: Counter[str] = field(default_factory=Counter)


def repair(folder: Path, group: str | None, readers: str | None) -> Touched:
    """The group reads and writes all in `folder`, also what is made there later, by whatever umask.

    group: None: each path keeps its own. readers: a second group, which may only read.
    Errors: UsageError for no folder, an unknown group, and readers where ACLs are not to be had.
    """
    _check_folder(folder)
    has_acl = shutil.which("setfacl") is not None
    if readers is not None and not has_acl:
        raise UsageError(
            "--readers: setfacl is not installed, and a second group needs ACLs", where=str(folder)
        )
    done, ours = Touched(), []
    for path, status in _paths(folder):
        if not _is_ours(status, done):
            continue
        if group is not None:
            _give_to(path, group)
        if stat.S_ISDIR(status.st_mode):
            path.chmod(stat.S_IMODE(status.st_mode) | 0o2770)
        else:
            executable = (status.st_mode & stat.S_IXUSR) >> 3
            path.chmod(stat.S_IMODE(status.st_mode) | 0o660 | executable)
        ours.append(path)
        done.num_paths += 1
    if not has_acl:
        tell(f"warning: {folder}: setfacl is not installed, so new files follow each user's umask")
        return done
    entries = ["group::rwX", "mask::rwX", *([f"group:{readers}:r-X"] if readers else [])]
    for start in range(0, len(ours), _MOST_ARGUMENTS):
        part = ours[start : start + _MOST_ARGUMENTS]
        _set_acl(entries, [], part, folder)
        if folders := [path for path in part if path.is_dir()]:
            _set_acl([*entries, "other::---"], ["--default"], folders, folder)
    return done


_MOST_ARGUMENTS = 500


def _set_acl(entries: list[str], options: list[str], paths: list[Path], folder: Path) -> None:
    run_tool(
        ["setfacl", *options, "--modify", ",".join(entries), "--", *paths],
        hint=f"does the file system of {folder} know ACLs, and is there such a group?",
    )


def give_readers(folder: Path, readers: str) -> None:
    """A second group may read `folder`, and all that is made there later."""
    entry = [f"group:{readers}:r-X"]
    _set_acl(entry, [], [folder], folder)
    _set_acl(entry, ["--default"], [folder], folder)


def touch(folder: Path) -> Touched:
    """Set the time of last use of every file to now. When a file was written stays as it was, so
    nothing that goes by it (make, rsync, our own digests' cache) takes it for another.

    Errors: UsageError for no folder.
    """
    _check_folder(folder)
    done = Touched()
    now_ns = time.time_ns()
    for path, status in _paths(folder):
        if stat.S_ISREG(status.st_mode) and _is_ours(status, done):
            os.utime(path, ns=(now_ns, status.st_mtime_ns), follow_symlinks=False)
            done.num_paths += 1
    return done


@dataclass(frozen=True)
class Removable:
    """What `clean` may remove. kind: in words."""

    path: Path
    kind: str
    size_bytes: int


def find_removable(folder: Path, least_hours: float) -> list[Removable]:
    """Caches of runs that nobody works in, and what killed processes left half-written.

    least_hours: since anything in it was written last.
    Errors: UsageError for no folder.
    """
    _check_folder(folder)
    found = []
    newest = time.time() - least_hours * _HOUR_S
    for place, kind in _candidates(folder):
        try:
            size_bytes, written = _size_and_time(place)
        except FileNotFoundError:  # Its process has just renamed it.
            continue
        if written <= newest:
            found.append(Removable(place, kind, size_bytes))
    return found


def remove(found: list[Removable]) -> None:
    for each in found:
        if each.path.is_dir() and not each.path.is_symlink():
            shutil.rmtree(each.path)
        else:
            each.path.unlink(missing_ok=True)


def _candidates(folder: Path) -> Iterator[tuple[Path, str]]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if RECORD_NAME in names:
            if is_live(here):
                folders.clear()  # All below is somebody's work at this moment.
                continue
            for name in _CACHES:
                if name in folders:
                    folders.remove(name)
                    yield here / name, "cache of a run"
            if (here / _SAVING).is_dir():
                yield here / _SAVING, "half-written checkpoint"
        for name in [*folders, *names]:
            if _LEFTOVER.fullmatch(name):
                yield here / name, "half-written"
        folders[:] = sorted(name for name in folders if not _LEFTOVER.fullmatch(name))


def _size_and_time(path: Path) -> tuple[int, float]:
    """(bytes, when anything in it was written last)."""
    size_bytes, written = 0, 0.0
    for _, status in _paths(path):
        size_bytes += status.st_size if stat.S_ISREG(status.st_mode) else 0
        written = max(written, status.st_mtime)
    return size_bytes, written


def _paths(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """`folder` and all below it but links, which are not followed."""
    yield folder, folder.lstat()
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            try:
                status = path.lstat()
            except FileNotFoundError:  # Gone since it was listed.
                continue
            if not stat.S_ISLNK(status.st_mode):
                yield path, status


def _is_ours(status: os.stat_result, done: Touched) -> bool:
    if os.geteuid() in (0, status.st_uid):
        return True
    done.of_others[_user_name(status.st_uid)] += 1
    return False


def _user_name(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _give_to(path: Path, group: str) -> None:
    try:
        shutil.chown(path, group=group)
    except LookupError:
        raise UsageError(f"--group: no such group: {group}", where=str(path)) from None
    except PermissionError:
        raise UsageError(f"--group: you are not in the group {group}", where=str(path)) from None


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder))
