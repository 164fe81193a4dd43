"""The sha256 of an image file, and whether it is the one that was pinned.

A 20 GB image is not read again at every start.
"""

import os
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from post_training.core.errors import PostTrainingError
from post_training.core.known_digests import file_identity, known_sha256

_LARGE_BYTES = 2 << 30
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


class ImageDigest(NamedTuple):
    """check: "hashed" (the file was read) or "cached"."""

    sha256: str
    check: str


def open_image(path: Path) -> int:
    """A descriptor of the image file. Errors: PostTrainingError for what is no file."""
    try:
        # Without O_NONBLOCK a pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PostTrainingError(
            "no such image",
            where=str(path),
            hint="`post-training image list` shows the store; `make push-sqsh` adds an image",
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PostTrainingError(f"cannot open the image: {reason}", where=str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise PostTrainingError(f"an image must be a file, and this is {kind}", where=str(path))
    return descriptor


def image_digest(path: Path) -> ImageDigest:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time."""
    descriptor = open_image(path)
    try:
        return open_image_digest(descriptor, path)
    finally:
        os.close(descriptor)


def open_image_digest(descriptor: int, path: Path) -> ImageDigest:
    """As image_digest, of the file that is open, whatever is at `path` by now.

    Errors: PostTrainingError when it was changed while it was read.
    """
    check = "cached"

    def announce(size_bytes: int) -> None:
        nonlocal check
        check = "hashed"
        if size_bytes > _LARGE_BYTES:
            print(f"verifying {path} ({size_bytes / 1e9:.0f} GB) …", file=sys.stderr)

    before = image_state(descriptor)
    digest = known_sha256(Path(f"/proc/self/fd/{descriptor}"), announce)
    check_unchanged(descriptor, before, path)
    return ImageDigest(digest, check)


def image_state(descriptor: int) -> tuple[int, ...]:
    """What changes when somebody writes to the open file; ctime, which a new link changes, is not
    among it."""
    *state, _ctime = file_identity(os.fstat(descriptor))
    return tuple(state)


def check_unchanged(descriptor: int, before: tuple[int, ...], path: Path) -> None:
    """Errors: PostTrainingError when the open file was written to since its state was `before`."""
    if image_state(descriptor) != before:
        raise PostTrainingError("the image was changed while it was verified", where=str(path))


def check_image_digest(path: Path, expected: str) -> ImageDigest:
    """Errors: PostTrainingError when the file is not the one that was pinned."""
    return expect_digest(image_digest(path), expected, path)


def expect_digest(digest: ImageDigest, expected: str, path: Path) -> ImageDigest:
    """Errors: PostTrainingError when the file at `path` is not the one that was pinned."""
    if digest.sha256 != expected:
        raise PostTrainingError(
            f"sha256 is {digest.sha256}, the EDF pins {expected}",
            where=str(path),
            hint="the image is damaged or was replaced: push it again, or render the EDF for it",
        )
    return digest
