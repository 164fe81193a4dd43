"""containers/images.lock: the released images, committed with the recipes they came from.

A release says which digests a version has, for whoever has no image store: a site that gets the
file by copy, an EDF that is checked. A version that was released is never another image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.files import read_json, write_json

_SCHEMA = "post-training/images-lock/1"
_FROM_RECORD = (
    *("name", "version", "platform", "input_hash", "oci_digest", "sqsh_sha256", "sif_sha256"),
    *("base_sha256", "lock_sha256"),
)


def images_lock(repository: Path) -> Path:
    return repository / "containers/images.lock"


def read_releases(repository: Path) -> list[dict[str, Any]]:
    """Every release, in the order they were made; none where there is no lock."""
    try:
        return read_json(images_lock(repository), _SCHEMA)["images"]
    except FileNotFoundError:
        return []


def release_entry(record: Mapping[str, Any], tested: str, released: str) -> dict[str, Any]:
    """What the lock says of an image. tested: what was run in it; released: when."""
    identity = {key: record.get(key) for key in _FROM_RECORD}
    return {
        **identity,
        "commit": record["checkout"]["commit"],
        "tested": tested,
        "released": released,
    }


def check_version_is_free(repository: Path, record: Mapping[str, Any]) -> None:
    """Errors: UsageError when this name and version were released as another image."""
    for entry in read_releases(repository):
        same_version = all(entry[key] == record[key] for key in ("name", "version", "platform"))
        if same_version and entry["oci_digest"] != record["oci_digest"]:
            raise UsageError(
                f"{entry['name']} {entry['version']} is released as {entry['oci_digest']}",
                where=str(images_lock(repository)),
                hint="raise the version in pyproject.toml and src/post_training/__init__.py",
            )


def add_release(repository: Path, entry: dict[str, Any]) -> None:
    """Append, or replace the entry of the same image."""
    kept = [
        other
        for other in read_releases(repository)
        if (other["name"], other["oci_digest"]) != (entry["name"], entry["oci_digest"])
    ]
    write_json(images_lock(repository), {"schema": _SCHEMA, "images": [*kept, entry]})
