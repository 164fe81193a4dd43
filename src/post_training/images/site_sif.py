"""A site's own SIF as the base of a recipe: base.lock pins it by its sha256, where it lies.

images/layer.py makes the image over it.
"""

from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.files import read_json, write_json
from post_training.images.identity import image_digest
from post_training.images.recipe import BASE_LOCK

_LOCK_SCHEMA = "post-training/site-sif-lock/1"
# https://github.com/sylabs/sif, pkg/sif/sif.go: launch line, magic, version, architecture.
_MAGIC_AT, _MAGIC = 32, b"SIF_MAGIC\0"
_ARCHITECTURE_AT, _ARCHITECTURES = 45, {b"02\0": "linux/amd64", b"04\0": "linux/arm64"}


def lock_site_sif(path: Path, sif: Path, platform: str) -> None:
    """Pin the SIF as the recipe's base. path: of base.lock.

    Errors: UsageError for a file that is no SIF, or one of another platform.
    """
    sif = sif.resolve()
    if (found := _platform_of(sif)) != platform:
        raise UsageError(f"is for {found}, the recipe is for {platform}", where=str(sif))
    lock = {"platform": platform, "file": str(sif), "sha256": image_digest(sif).sha256}
    write_json(path, {"schema": _LOCK_SCHEMA, **lock, "size_bytes": sif.stat().st_size})


def locked_site_sif(folder: Path) -> dict[str, Any] | None:
    """The recipe's base.lock, if it names a site's SIF; else None."""
    try:
        return read_json(folder / BASE_LOCK, _LOCK_SCHEMA)
    except (FileNotFoundError, UsageError):
        return None  # Other kinds of base have other schemas.


def _platform_of(sif: Path) -> str:
    try:
        with open(sif, "rb") as file:
            header = file.read(_ARCHITECTURE_AT + 3)
    except OSError as error:
        raise UsageError((error.strerror or str(error)).lower(), where=str(sif)) from None
    if header[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        raise UsageError("is no SIF", where=str(sif), hint="`singularity pull` makes one")
    return _ARCHITECTURES.get(header[_ARCHITECTURE_AT:], "another platform")
