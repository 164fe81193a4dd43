"""Locks of files: who works in a folder, among processes of one node or of many.

All are of one kind, open file description locks (fcntl(2), F_OFD_SETLK). They belong to the open
file, and end with the process however it ends. The plain locks of fcntl (lockf) end when a process
closes any descriptor of the file: a run that only looked at its own lock would give it up. Those of
flock(2) stay on one node where NFS or Lustre is mounted so. On the network these and lockf's are
the same, so programs that use the one and the other keep each other out.
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

# struct flock of 64-bit Linux, whose length 0 is the whole file: l_type, l_whence, l_start, l_len,
# l_pid, which has to be 0.
_FLOCK = "hhqqi"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_held: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def hold(path: Path) -> BinaryIO | None:
    """Lock the file, which is made where it is missing; None when somebody else holds it.

    The lock is held until what is returned is closed, or garbage, or the process ends.
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
    """Hold the lock of the file, once nobody else does. on_wait: called when that takes its time.

    The file is left there: a removed one would not keep the next out. Errors: as of `hold`.
    """
    with _open(path) as file:
        if not _lock(file, path, fcntl.F_OFD_SETLK):
            on_wait()
            _lock(file, path, fcntl.F_OFD_SETLKW)
        yield


def is_held(path: Path) -> bool:
    """Whether anybody holds it, this process too; False where there is no file.

    Who asks takes no lock, in the way of a process that starts this moment, and need not be allowed
    to write there. Errors: as of `hold`.
    """
    try:
        with open(path, "rb") as file:
            return _ask(file, path, fcntl.F_OFD_GETLK) != fcntl.F_UNLCK
    except FileNotFoundError:
        return False


def _open(path: Path) -> BinaryIO:
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o666))


def _lock(file: BinaryIO, path: Path, command: int) -> bool:
    try:
        _ask(file, path, command)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either.
            return False
        raise
    _let_children_go()
    _held.add(file)
    return True


def _ask(file: BinaryIO, path: Path, command: int) -> int:
    """The type of lock that the kernel answers with."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        return struct.unpack_from(_FLOCK, fcntl.fcntl(file, command, asked))[0]
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
def _let_children_go() -> None:
    """A child that is forked shares the open files: it would hold the lock on after our end."""

    def close_all() -> None:
        for file in _held:
            file.close()

    os.register_at_fork(after_in_child=close_all)


def _file_system(path: Path) -> tuple[str, str]:
    """Its type, and where it is mounted: `lustre`, `/scratch`."""
    real = Path(os.path.realpath(path))
    found = ("unknown", "/")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        place = Path(mounted.encode().decode("unicode_escape"))  # A space is \040.
        # The last one covers those before it.
        if real.is_relative_to(place) and len(place.parts) >= len(Path(found[1]).parts):
            found = (kind, str(place))
    return found
