"""The image store: a folder of squashfs images, each named by its sha256 and with its record.

    sha256-<hex>.sqsh      the image; complete or absent
    sha256-<hex>.json      its record; written after the image, so its presence means complete
    sha256-<hex>.sif       the same image for Singularity, by its own sha256; the record names it
    index.json             the most important keys of all records; written anew at every push
    removed/               records of images that `image gc` removed, to build them again
    runs.json              the folders in which `image gc` looks for runs
    bases/, wheels/NAME/, system/   what builds are made of, by hash
    compiled/              wheels that `image compile` made; nothing removes them

The record counts, and its seal shows an edit; the index is made from it and may be deleted.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import atomic_file, check_keys, read_json, write_json
from post_training.core.hashing import sha256_file
from post_training.core.locks import is_held, locked
from post_training.images.identity import seal

RECORD_SCHEMA = "post-training/image-record/1"
_INDEX_KEYS = (
    "name",
    "version",
    "input_hash",
    "oci_digest",
    "sqsh_sha256",
    "sif_sha256",
    "size_bytes",
    "pushed",
)
# Every record, and every entry of the index, has these, and none of them is null.
_NEEDED = tuple(key for key in _INDEX_KEYS if key != "sif_sha256")
_SHORTEST_PREFIX = 8
_WORK = ".work-"
# How long a work folder may have no lock yet: it is made a moment before its lock.
_WORK_STARTS_S = 60


class Verification(NamedTuple):
    """One file of an image, hashed again. status: "ok", "missing" or "corrupt"."""

    status: str
    path: Path
    expected: str
    found: str | None


class ImageStore:
    """The images in `folder`; which need not exist before something is added."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def image_path(self, sqsh_sha256: str) -> Path:
        return self.folder / f"sha256-{sqsh_sha256}.sqsh"

    def sif_path(self, sif_sha256: str) -> Path:
        return self.folder / f"sha256-{sif_sha256}.sif"

    def record_path(self, sqsh_sha256: str) -> Path:
        return self.folder / f"sha256-{sqsh_sha256}.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time; readers need no lock. Who waits is told so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(
            self.folder / ".lock",
            on_wait=lambda: tell(f"waiting for another build, push or pull in {self.folder} …"),
        ):
            yield

    @contextmanager
    def work_folder(self, part: str = "") -> Iterator[Path]:
        """A temporary folder in the store, for work that needs no lock; removed at the end.

        part: the folder of the store (`bases`) that its result goes to.
        """
        (self.folder / part).mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=_WORK, dir=self.folder / part) as folder,
            locked(Path(folder) / ".live"),
        ):
            yield Path(folder)

    def abandoned_work(self) -> list[Path]:
        """The work folders of killed processes."""
        folders = [*self.folder.glob(f"{_WORK}*"), *self.folder.glob(f"bases/{_WORK}*")]
        return [path for path in folders if not _is_live(path)]

    def remove_abandoned_work(self) -> None:
        for path in self.abandoned_work():
            # A process that ends at this moment removes its own.
            with suppress(FileNotFoundError):
                shutil.rmtree(path)

    def records(self) -> list[dict[str, Any]]:
        """Every image's record, the last pushed first."""
        return _read_records(self.folder)

    def index(self) -> list[dict[str, Any]]:
        """The most important keys of all records, the last pushed first.

        A damaged index is written anew.
        """
        path = self.folder / "index.json"
        if not path.exists():
            return [_index_entry(record) for record in self.records()]
        try:
            images = json.loads(path.read_text())["images"]
            if all(entry[key] is not None for entry in images for key in _NEEDED):
                return images
        except (ValueError, TypeError, KeyError):
            pass
        tell(f"warning: {path}: damaged; made anew from the records")
        self._write_index()
        return [_index_entry(record) for record in self.records()]

    def removed_records(self) -> list[dict[str, Any]]:
        """The records of images that were removed, the last pushed first."""
        return _read_records(self.folder / "removed")

    def files(self, record: dict[str, Any]) -> list[Path]:
        """Where the image's files are: the squashfs, and the SIF if there is one."""
        sif = record.get("sif_sha256")
        return [self.image_path(record["sqsh_sha256"]), *([self.sif_path(sif)] if sif else [])]

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Seal and write the record of an image whose files are in place; the sealed record.

        Hold `lock` while calling it.
        """
        digest = record["sqsh_sha256"]
        record = {**record, "seal": seal(record)}
        write_json(self.record_path(digest), record)
        self._removed_path(digest).unlink(missing_ok=True)
        self._write_index()
        return record

    def copy_from(self, other: "ImageStore", record: dict[str, Any]) -> dict[str, Any]:
        """Copy an image of another store, each file hashed once it is here; the record here.

        Errors: PostTrainingError for a file that is not what its name says.
        """
        with self.lock():
            for source in other.files(record):
                target = self.folder / source.name
                if target.exists() and _verify(target).status == "ok":
                    continue
                with atomic_file(target) as temporary:
                    shutil.copyfile(source, temporary)
                    found = sha256_file(temporary)
                    if source.stem != f"sha256-{found}":
                        raise PostTrainingError(
                            f"damaged: its sha256 is {found}, not what its name says",
                            where=str(source),
                            hint="`post-training image rebuild` makes it again",
                        )
            return self.add({key: value for key, value in record.items() if key != "seal"})

    def remove(self, record: dict[str, Any]) -> None:
        """Remove an image and keep its record in removed/. Hold `lock` while calling it."""
        digest = record["sqsh_sha256"]
        # The record first: killed in between, an image without a record is a leftover for gc to
        # remove, but a record without its image would be a fault.
        self._removed_path(digest).parent.mkdir(exist_ok=True)
        self.record_path(digest).replace(self._removed_path(digest))
        self._write_index()
        # The link to a site's SIF is shared by all images over it.
        kept = {path for other in self.records() for path in self.files(other)}
        for path in self.files(record):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _removed_path(self, sqsh_sha256: str) -> Path:
        return self.folder / "removed" / f"sha256-{sqsh_sha256}.json"

    def _write_index(self) -> None:
        write_json(
            self.folder / "index.json",
            {"images": [_index_entry(record) for record in self.records()]},
        )

    def find(self, reference: str) -> dict[str, Any]:
        """The record of the image that `reference` names.

        reference: an OCI config digest or a file's sha256 (whole or its first 8 digits or more,
        with or without `sha256:`), or NAME or NAME:VERSION, where the last pushed is meant.
        Errors: UsageError when none or several match.
        """
        if entry := self._match(reference, self.index()):
            return self.record(entry["sqsh_sha256"])
        hint = "`post-training image list` shows what is there; `make image && make push-sqsh` "
        hint += "builds and adds one"
        if self._match(reference, self.removed_records()):
            hint = f"`image gc` removed it; `post-training image rebuild {reference}` builds it"
        raise UsageError(f"no image {reference!r} in the store", where=str(self.folder), hint=hint)

    def find_recorded(self, reference: str) -> dict[str, Any]:
        """As `find`, but also among the images that were removed."""
        removed = self._match(reference, self.removed_records())
        return (
            removed
            if removed and not self._match(reference, self.index())
            else self.find(reference)
        )

    def _match(self, reference: str, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The first of `entries` (the last pushed first) that `reference` names."""
        for entry in entries:
            if reference in (entry["name"], f"{entry['name']}:{entry['version']}"):
                return entry
        prefix = reference.removeprefix("sha256:").removeprefix("sha256-")
        prefix = prefix.removesuffix(".sqsh")
        if len(prefix) < _SHORTEST_PREFIX:
            return None
        matches = [
            entry
            for entry in entries
            if any(digest.startswith(prefix) for digest in digests(entry))
        ]
        # One OCI image may have been squashed more than once; those are the same image.
        if len({entry["oci_digest"] for entry in matches}) > 1:
            raise UsageError(
                f"{reference!r} names {len(matches)} images",
                where=str(self.folder),
                hint="give more digits",
            )
        return matches[0] if matches else None

    def find_built(self, input_hash: str) -> dict[str, Any] | None:
        """The record of a complete image made from these inputs, or None."""
        for entry in self.index():
            if entry["input_hash"] == input_hash and self.image_path(entry["sqsh_sha256"]).exists():
                return self.record(entry["sqsh_sha256"])
        return None

    def record(self, sqsh_sha256: str) -> dict[str, Any]:
        """Errors: UsageError for what is no record of this image, or was changed since."""
        return _read_record(self.record_path(sqsh_sha256))

    def file_fault(self, entry: dict[str, Any]) -> str | None:
        """ "missing" or "damaged" (another size), or None. The file is not read: see `verify`."""
        path = self.image_path(entry["sqsh_sha256"])
        if not path.is_file():
            return "missing"
        return None if path.stat().st_size == entry["size_bytes"] else "damaged"

    def verify(self, record: dict[str, Any]) -> list[Verification]:
        """Hash the image's files again and compare with their names."""
        return [_verify(path) for path in self.files(record)]


def open_store(folder: Path | None) -> ImageStore:
    """The image store in `folder`; unless given, the user's (see `default_store`)."""
    return ImageStore(folder or default_store())


def default_store() -> Path:
    """$POST_TRAINING_IMAGE_STORE, or post-training/images in the user's data folder."""
    if chosen := os.environ.get("POST_TRAINING_IMAGE_STORE"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(data) / "post-training/images"


def _read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record in the folder, the last pushed first."""
    records = [_read_record(path) for path in folder.glob("sha256-*.json")]
    return sorted(records, key=lambda record: record["pushed"], reverse=True)


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path, RECORD_SCHEMA)
    check_keys(record, _NEEDED, path)
    if wrong := [key for key in _NEEDED if not isinstance(record[key], int | str)]:
        raise UsageError(f"no record any more: {wrong[0]} is {record[wrong[0]]!r}", where=str(path))
    if path.stem != f"sha256-{record['sqsh_sha256']}":
        raise UsageError("the record is of another image than its name says", where=str(path))
    # Records of earlier versions have no seal.
    if record.get("seal", seal(record)) != seal(record):
        raise UsageError(
            "the record was changed after the push",
            where=str(path),
            hint="undo the change; `post-training image rebuild` builds the image again from it",
        )
    return record


def _is_live(work_folder: Path) -> bool:
    # No lock yet: made this moment, or its process was killed in that moment.
    if not (work_folder / ".live").exists():
        with suppress(FileNotFoundError):
            return time.time() - work_folder.stat().st_mtime < _WORK_STARTS_S
        return True  # its process removed it since it was listed
    return is_held(work_folder / ".live")


def _verify(path: Path) -> Verification:
    expected = path.stem.removeprefix("sha256-")
    if not path.exists():
        return Verification("missing", path, expected, None)
    found = sha256_file(path)
    return Verification("ok" if found == expected else "corrupt", path, expected, found)


def digests(record: dict[str, Any]) -> set[str]:
    """Every digest by which the image may be named, as hexadecimal digits."""
    return {
        record[key].removeprefix("sha256:")
        for key in ("oci_digest", "sqsh_sha256", "sif_sha256")
        if record.get(key)
    }


def _index_entry(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in _INDEX_KEYS}
