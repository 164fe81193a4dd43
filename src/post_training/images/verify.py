"""The sha256 of an image file, and whether it is the one that was pinned.

A 20 GB image is not read again at every start.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from post_training.core.errors import PostTrainingError
from post_training.core.known_digests import known_sha256

_LARGE_BYTES = 2 << 30


class ImageDigest(NamedTuple):
    """check: "hashed" (the file was read) or "cached"."""

    sha256: str
    check: str


def image_digest(path: Path) -> ImageDigest:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time."""
    check = "cached"

    def announce(size_bytes: int) -> None:
        nonlocal check
        check = "hashed"
        if size_bytes > _LARGE_BYTES:
            print(f"verifying {path} ({size_bytes / 1e9:.0f} GB) …", file=sys.stderr)

    try:
        digest = known_sha256(path, announce)
    except FileNotFoundError:
        raise PostTrainingError(
            "no such image",
            where=str(path),
            hint="`post-training image list` shows the store; `make push-sqsh` adds an image",
        ) from None
    return ImageDigest(digest, check)


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
