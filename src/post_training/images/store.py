"""The image store: a folder of squashfs images, each named by its sha256 and with its record.

    sha256-<hex>.sqsh      the image; complete or absent
    sha256-<hex>.json      its record; written after the image, so its presence means complete
    index.json             the records in short; made anew from them at every push
    bases/, wheels/NAME/   what builds are made of, by hash

The record is the truth; the index is derived and may be deleted.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from post_training.core.errors import UsageError
from post_training.core.files import read_json, write_json
from post_training.core.hashing import sha256_file

RECORD_SCHEMA = "post-training/image-record/1"
_INDEX_KEYS = ("name", "version", "input_hash", "oci_digest", "sqsh_sha256", "size_bytes", "pushed")
_SHORTEST_PREFIX = 8


def default_store() -> Path:
    """$POST_TRAINING_IMAGE_STORE, or post-training/images in the user's data folder."""
    if chosen := os.environ.get("POST_TRAINING_IMAGE_STORE"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(data) / "post-training/images"


class Verification(NamedTuple):
    """status: "ok", "missing" or "corrupt"."""

    status: str
    path: Path
    expected: str
    found: str | None


class ImageStore:
    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def image_path(self, sqsh_sha256: str) -> Path:
        return self.folder / f"sha256-{sqsh_sha256}.sqsh"

    def record_path(self, sqsh_sha256: str) -> Path:
        return self.folder / f"sha256-{sqsh_sha256}.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time; readers need no lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def records(self) -> list[dict[str, Any]]:
        """Every image's record, the last pushed first."""
        records = [read_json(path, RECORD_SCHEMA) for path in self.folder.glob("sha256-*.json")]
        return sorted(records, key=lambda record: record["pushed"], reverse=True)

    def index(self) -> list[dict[str, Any]]:
        """The records in short, the last pushed first."""
        path = self.folder / "index.json"
        if not path.exists():
            return [_short(record) for record in self.records()]
        return json.loads(path.read_text())["images"]

    def add(self, record: dict[str, Any]) -> None:
        """Write the record of an image that is in its place, then the index. Call it locked."""
        write_json(self.record_path(record["sqsh_sha256"]), record)
        write_json(
            self.folder / "index.json", {"images": [_short(record) for record in self.records()]}
        )

    def find(self, reference: str) -> dict[str, Any]:
        """The record of the image that `reference` names.

        reference: an OCI config digest or a squashfs sha256 (whole or its first 8 digits or more,
        with or without `sha256:`), or NAME or NAME:VERSION, where the last pushed is meant.
        Errors: UsageError when none or several match.
        """
        bare = reference.removeprefix("sha256:").removeprefix("sha256-").removesuffix(".sqsh")
        index = self.index()
        named = [e for e in index if reference in (e["name"], f"{e['name']}:{e['version']}")]
        if named:
            return self.record(named[0]["sqsh_sha256"])
        matches = [
            entry
            for entry in index
            if len(bare) >= _SHORTEST_PREFIX
            and (
                entry["sqsh_sha256"].startswith(bare)
                or entry["oci_digest"].removeprefix("sha256:").startswith(bare)
            )
        ]
        if not matches:
            raise UsageError(
                f"no image {reference!r} in the store",
                where=str(self.folder),
                hint="`post-training image list` shows what is there; `make image && "
                "make push-sqsh` builds and adds one",
            )
        # One OCI image may have been squashed more than once; those are the same image.
        if len({entry["oci_digest"] for entry in matches}) > 1:
            raise UsageError(
                f"{reference!r} names {len(matches)} images",
                where=str(self.folder),
                hint="give more digits",
            )
        return self.record(matches[0]["sqsh_sha256"])

    def find_built(self, input_hash: str) -> dict[str, Any] | None:
        """The record of a complete image made from these inputs, or None."""
        for entry in self.index():
            if entry["input_hash"] == input_hash and self.image_path(entry["sqsh_sha256"]).exists():
                return self.record(entry["sqsh_sha256"])
        return None

    def record(self, sqsh_sha256: str) -> dict[str, Any]:
        return read_json(self.record_path(sqsh_sha256), RECORD_SCHEMA)

    def verify(self, record: dict[str, Any]) -> Verification:
        """Hash the image again, whole, and compare."""
        expected = record["sqsh_sha256"]
        path = self.image_path(expected)
        if not path.exists():
            return Verification("missing", path, expected, None)
        found = sha256_file(path)
        return Verification("ok" if found == expected else "corrupt", path, expected, found)


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in _INDEX_KEYS}
