"""The sha256 of a large file, read once: the answer is cached by the file's identity.

The cache key is device, inode, size, mtime and ctime: no user can change a file's bytes and keep
all five.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from post_training.core.files import user_cache
from post_training.core.hashing import sha256_file

# A smaller file is read as fast as its entry in the cache.
_SMALL_BYTES = 1 << 20


def known_sha256(path: Path, on_read: Callable[[int], None] = lambda size_bytes: None) -> str:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time.

    on_read: called before the file is read, where its digest is not known.
    Errors: FileNotFoundError.
    """
    status = path.stat()
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    entry = user_cache() / "verified" / "-".join(str(number) for number in identity)
    try:
        return entry.read_text()
    except OSError:
        pass
    on_read(status.st_size)
    digest = sha256_file(path)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=entry.parent)
        with open(descriptor, "w") as file:
            file.write(digest)
        os.replace(temporary, entry)
    except OSError:
        pass  # A read-only home: correct all the same, only slower.
    return digest


def sha256_of_any(path: Path) -> str:
    """sha256 of a file of any size, from the cache where it is a large one.

    Errors: FileNotFoundError.
    """
    return sha256_file(path) if path.stat().st_size < _SMALL_BYTES else known_sha256(path)
