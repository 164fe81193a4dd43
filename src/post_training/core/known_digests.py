"""The sha256 of a large file, read once: the answer is cached by the file's identity.

The cache key is device, inode, size, mtime and ctime. A file is not remembered where these may not
show its next change: when it was changed less than two seconds before it was read (file systems
count time in ticks, and two writes within one have one time), or while it was read. What the key
cannot notice: whoever may write to the disk beside the file system, or set the machine's clock.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from post_training.core.files import user_cache, write_atomic
from post_training.core.hashing import sha256_file

# A smaller file is read as fast as its entry in the cache.
_SMALL_BYTES = 1 << 20
_YOUNG_S = 2
_DIGEST = re.compile(r"[0-9a-f]{64}")

Identity = tuple[int, ...]


def file_identity(status: os.stat_result) -> Identity:
    """What changes when the file's bytes do."""
    return (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )


def known_sha256(path: Path, on_read: Callable[[int], None] = lambda size_bytes: None) -> str:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time.

    path: may be /proc/self/fd/N, for the file that is open already. on_read: called before the
    file is read, where its digest is not known.
    Errors: FileNotFoundError.
    """
    with open(path, "rb") as file:
        if digest := _remembered(_entry(file_identity(os.fstat(file.fileno())))):
            return digest
        digest, identity = read_sha256(file, on_read)
    if identity is not None:
        # A read-only home: correct all the same, only slower.
        with suppress(OSError):
            write_atomic(_entry(identity), digest)
    return digest


def read_sha256(
    file: BinaryIO, on_read: Callable[[int], None] = lambda size_bytes: None
) -> tuple[str, Identity | None]:
    """sha256 of a file that was just opened, and the identity by which it is known from now on;
    None where its next change might not show."""
    identity, started = flushed_identity(file), time.time()
    on_read(os.fstat(file.fileno()).st_size)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_same = identity == file_identity(os.fstat(file.fileno()))
    return digest, identity if is_same and not _is_young(identity, started) else None


def flushed_identity(file: BinaryIO) -> Identity:
    """The file's identity once what programs wrote through memory maps is on the disk.

    A mapped page changes the file's times when it is written first, and not again before it is
    flushed: without this, the second write would not show.
    """
    with suppress(OSError):  # Of a read-only file system: nothing is waiting there.
        os.fsync(file.fileno())
    return file_identity(os.fstat(file.fileno()))


def sha256_of_any(path: Path) -> str:
    """sha256 of a file of any size, from the cache where it is a large one.

    Errors: FileNotFoundError.
    """
    return sha256_file(path) if path.stat().st_size < _SMALL_BYTES else known_sha256(path)


def _entry(identity: Identity) -> Path:
    return user_cache() / "verified" / "-".join(str(number) for number in identity)


def _remembered(entry: Path) -> str | None:
    """None for an entry that is no digest too: a disk that was full, or a machine that went down,
    may leave one."""
    try:
        text = entry.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _DIGEST.fullmatch(text) else None


def _is_young(identity: Identity, now: float) -> bool:
    """Whether a file that is read from `now` on was changed so shortly before that its next change
    might not show."""
    *_, mtime, ctime = (number / 1e9 for number in identity)
    # Anybody may set mtime, to next year as well; ctime is the kernel's own, or a server's.
    return abs(now - mtime) < _YOUNG_S or ctime > now - _YOUNG_S
