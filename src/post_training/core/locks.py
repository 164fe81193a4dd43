"""File locks: which process works in a folder, on one node or on many.

All are of one kind, open file description locks (fcntl(2), F_OFD_SETLK). Such a lock belongs to the
open file and ends with the process, however that ends. Two other kinds are not used:

    lockf      (fcntl's plain locks) ends when the process closes any descriptor of the file: a run
               that only looks at its own lock would lose it
    flock(2)   may hold on one node only, as NFS or Lustre is mounted

Ours and lockf's exclude each other, so a program that uses lockf is kept out too.
"""

import errno
import fcntl
import functools
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from post_training.core.errors import UsageError
from post_training.core.files import parse_mount_table

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len (0: the whole file), l_pid (must be
# 0 for this kind of lock).
_FLOCK = "hhqqi"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
# Every lock that this process holds, for a forked child to close.
_held: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def hold(path: Path) -> BinaryIO | None:
    """Lock the file, which is made where it is missing; None when somebody else holds the lock.

    The lock ends when the returned file is closed or collected as garbage, or the process ends.
    Errors: UsageError where the file system has no locks; OSError with the path, as of a full disk.
    """
    file = _open(path)
    try:
        is_ours = _lock(file, path, fcntl.F_OFD_SETLK)
    except BaseException:
        file.close()
        raise
    if is_ours:
        return file
    file.close()
    return None


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of the file; wait while somebody else does.

    on_wait: called once, before waiting.
    The file is not removed at the end: who waits for a removed file and who makes a new one would
    both hold a lock. Errors: as of `hold`.
    """
    with _open(path) as file:
        if not _lock(file, path, fcntl.F_OFD_SETLK):
            on_wait()
            _lock(file, path, fcntl.F_OFD_SETLKW)
        yield


def is_held(path: Path) -> bool:
    """Whether any process holds the lock, this one included; False where there is no file.

    Asking takes no lock, which could stop a process that starts at this moment, and needs no
    permission to write. Errors: as of `hold`.
    """
    try:
        with open(path, "rb") as file:
            return _call_fcntl(file, path, fcntl.F_OFD_GETLK) != fcntl.F_UNLCK
    except FileNotFoundError:
        return False


def _open(path: Path) -> BinaryIO:
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o666))


def _lock(file: BinaryIO, path: Path, command: int) -> bool:
    """Whether the lock is ours now."""
    try:
        _call_fcntl(file, path, command)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either.
            return False
        raise
    _close_in_children()
    _held.add(file)
    return True


def _call_fcntl(file: BinaryIO, path: Path, command: int) -> int:
    """Ask for a write lock on the whole file; the type of lock that the kernel answers with."""
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        return struct.unpack_from(_FLOCK, fcntl.fcntl(file, command, request))[0]
    except OSError as error:
        if error.errno in _NO_LOCKS:
            kind, mounted = _file_system(path)
            raise UsageError(
                f"files can't be locked on this file system ({kind}, mounted on {mounted}): "
                f"{os.strerror(error.errno).lower()}",
                where=str(path),
                hint="choose a folder elsewhere, or have it mounted with locks (Lustre: -o flock)",
            ) from None
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


@functools.cache
def _close_in_children() -> None:
    """Have forked children close the files: they share them, and would hold the locks after our
    end. Once a process."""

    def close_all() -> None:
        for file in _held:
            file.close()

    os.register_at_fork(after_in_child=close_all)


def _file_system(path: Path) -> tuple[str, str]:
    """The type of the path's file system and where it is mounted: `lustre`, `/scratch`."""
    real = Path(os.path.realpath(path))
    found = ("unknown", "/")
    for place, kind in parse_mount_table(Path("/proc/self/mountinfo").read_text()):
        # A later mount covers an earlier one at the same place.
        if real.is_relative_to(place) and len(Path(place).parts) >= len(Path(found[1]).parts):
            found = (kind, place)
    return found
