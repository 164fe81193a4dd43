"""The sha256 of an image file, read once: the answer is cached by the file's identity.

A 20 GB image is not read again at every start. The cache key is device, inode, size, mtime and
ctime: no user can change a file's bytes and keep all five.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import sha256_file

_LARGE_BYTES = 2 << 30


class ImageDigest(NamedTuple):
    """check: "hashed" (the file was read) or "cached"."""

    sha256: str
    check: str


def image_digest(path: Path) -> ImageDigest:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise PostTrainingError(
            "no such image",
            where=str(path),
            hint="`post-training image list` shows the store; `make push-sqsh` adds an image",
        ) from None
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    entry = _cache_folder() / "-".join(str(number) for number in identity)
    try:
        return ImageDigest(entry.read_text(), "cached")
    except OSError:
        pass
    if status.st_size > _LARGE_BYTES:
        print(f"verifying {path} ({status.st_size / 1e9:.0f} GB) …", file=sys.stderr)
    digest = sha256_file(path)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=entry.parent)
        with open(descriptor, "w") as file:
            file.write(digest)
        os.replace(temporary, entry)
    except OSError:
        pass  # A read-only home: correct all the same, only slower.
    return ImageDigest(digest, "hashed")


def check_image_digest(path: Path, expected: str) -> ImageDigest:
    """Errors: PostTrainingError when the file is not the one that was pinned."""
    digest = image_digest(path)
    if digest.sha256 != expected:
        raise PostTrainingError(
            f"sha256 is {digest.sha256}, the EDF pins {expected}",
            where=str(path),
            hint="the image is damaged or was replaced: push it again, or render the EDF for it",
        )
    return digest


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or os.path.expanduser("~/.cache")) / "post-training/verified"
