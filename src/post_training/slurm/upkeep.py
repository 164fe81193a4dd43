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
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
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
    entries = ["group::rwX", "mask::rwX", *([f"group:{readers}:r-X"] if readers else [])]
    done = Touched()
    with closing(_open_all(folder)) as found:
        while part := list(islice(_opened_to_group(found, group, done), _MOST_OPEN)):
            try:
                if has_acl:
                    _set_acl(entries, [], [each.place for each in part], folder)
                    folders = [each.place for each in part if stat.S_ISDIR(each.status.st_mode)]
                    if folders:
                        _set_acl([*entries, "other::---"], ["--default"], folders, folder)
            finally:
                for each in part:
                    os.close(each.descriptor)
    if not has_acl:
        tell(f"warning: {folder}: setfacl is not installed, so new files follow each user's umask")
    return done


_MOST_OPEN = 200


@dataclass(frozen=True)
class _Open:
    """A file or folder that is held open: whoever may write in its folder can put a link to
    something else at its path, and could so have that opened to the group."""

    path: Path
    descriptor: int
    status: os.stat_result

    @property
    def place(self) -> Path:
        """By which this process, and what it starts, reaches it whatever its path leads to now."""
        return Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")


def _open_all(folder: Path) -> Iterator[_Open]:
    """`folder` and all below it but links. Who takes one closes it."""
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _Open(folder, os.dup(top), os.fstat(top))
        for place, folders, names, here in os.fwalk(".", dir_fd=top):
            for name in (*folders, *names):
                try:
                    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
                except FileNotFoundError:  # Gone since it was listed.
                    continue
                status = os.fstat(descriptor)
                if stat.S_ISLNK(status.st_mode):
                    os.close(descriptor)
                else:
                    yield _Open(folder / place / name, descriptor, status)
    finally:
        os.close(top)


def _opened_to_group(found: Iterator[_Open], group: str | None, done: Touched) -> Iterator[_Open]:
    """Those that are this user's, each once its mode lets the group in: only then can a folder that
    its owner could not read be gone through."""
    for each in found:
        if not _is_ours(each.status, done):
            os.close(each.descriptor)
            continue
        if group is not None:
            _give_to(each, group)
        mode = stat.S_IMODE(each.status.st_mode)
        if stat.S_ISDIR(each.status.st_mode):
            each.place.chmod(mode | 0o2770)
        else:
            each.place.chmod(mode | 0o660 | (mode & stat.S_IXUSR) >> 3)
        done.num_paths += 1
        yield each


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
            with suppress(FileNotFoundError):  # Gone since it was listed.
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


def _give_to(each: _Open, group: str) -> None:
    where = str(each.path)
    try:
        shutil.chown(each.place, group=group)
    except LookupError:
        raise UsageError(f"--group: no such group: {group}", where=where) from None
    except PermissionError:
        raise UsageError(f"--group: you are not in the group {group}", where=where) from None


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder))
