"""`post-training image gc`: which images may be removed.

Kept are the newest image of each name; released ones (containers/images.lock); those that the
user's EDFs pin; the bases of recipes and of other images; and those that a file in the run folders
names: a run's record, an artifact's, the EDF of a submitted job. The files are searched for digests
as text, so their format does not matter.

The run folders are remembered in the store (runs.json); links in them are followed. A file there,
or an EDF, that can't be read is an error: it may name an image. A link to nothing gives a warning.

A removed image leaves its record in removed/, from which `post-training image rebuild` makes it
again. For that, what it was made of (bases, a distribution's packages) is kept too: the mirrors may
not have it any more.

The builder's own storage holds each image once more. Kept there are the newest of each name, whose
layers the next build uses, bases, and images that were never pushed.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import write_json
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.images import builder
from post_training.images.store import ImageStore, digests

# environment.toml, or job.sh on a site with Singularity, names the image of a submitted run.
_RUN_FILES = {"run.json", ARTIFACT_RECORD, "environment.toml", "job.sh"}
_RUN_HINT = "its runs may name images; mount it, or `image gc --forget FOLDER` if it is gone"
_EDF_HINT = "it may pin an image; make it readable, or remove it"
_DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


class Verdict(NamedTuple):
    """kept_for: why the image stays; None when it may be removed."""

    record: dict[str, Any]
    kept_for: str | None


@dataclass(frozen=True)
class Plan:
    """What may be removed.

    images: a verdict for each. files: bases that no image is made of, leftovers. built: tags in the
    builder's storage. size_bytes: of all of it without `built`, whose images share their layers.
    dangling: EDFs and records that are links to nothing.
    """

    images: list[Verdict]
    files: list[Path]
    built: list[str]
    size_bytes: int
    dangling: list[Path]

    def as_json(self) -> dict[str, Any]:
        keys = ("name", "version", "oci_digest", "sqsh_sha256")
        return {
            "images": [
                {**{key: verdict.record[key] for key in keys}, "kept_for": verdict.kept_for}
                for verdict in self.images
            ],
            "files": [str(path) for path in self.files],
            "built": self.built,
            "size_bytes": self.size_bytes,
            "dangling": [str(path) for path in self.dangling],
        }


class RunFolders:
    """The folders in which runs that use this store are kept; remembered in the store."""

    def __init__(self, store: ImageStore):
        self._path = store.folder / "runs.json"
        self.folders: list[str] = []
        if self._path.exists():
            self.folders = json.loads(self._path.read_text())["folders"]

    def remember(self, folders: Iterable[Path]) -> None:
        new = [str(folder.resolve()) for folder in folders]
        self.folders = sorted({*self.folders, *new})
        write_json(self._path, {"folders": self.folders})

    def forget(self, folder: Path) -> None:
        """Errors: UsageError when it is not remembered."""
        # Also as it was given: a folder that is gone can't be resolved.
        names = {str(folder), str(folder.resolve())}
        if not names & set(self.folders):
            raise UsageError(f"{folder} is not remembered", where=str(self._path))
        self.folders = [name for name in self.folders if name not in names]
        write_json(self._path, {"folders": self.folders})


def plan(
    store: ImageStore,
    run_folders: Iterable[str],
    releases: Iterable[Mapping[str, Any]],
    edf_folders: Iterable[Path],
    locked: Iterable[str],
    built: Mapping[str, str],
) -> Plan:
    """Decide what may be removed. Hold the store's lock while calling it.

    run_folders, edf_folders: searched for digests. releases: the entries of images.lock.
    locked: the sha256 of bases (also images of ours), and of locks of a distribution's packages,
    that the next build would use. built: {tag: OCI digest} in the builder's storage.
    Errors: PostTrainingError when a run folder, an EDF folder or a file in them cannot be read.
    """
    dangling: list[Path] = []
    run_files = (path for folder in run_folders for path in _run_files(Path(folder)))
    named_by = _digests_in(run_files, _RUN_HINT, dangling)
    edfs = (path for folder in edf_folders for path in _edf_files(folder))
    pinned_by = _digests_in(edfs, _EDF_HINT, dangling)
    released = set().union(*(digests(entry) for entry in releases))
    records, removed = store.records(), store.removed_records()
    bases = set(locked)
    bases |= {each["base_sha256"] for each in [*records, *removed] if each.get("over")}
    # The last pushed comes first.
    newest = {record["name"]: record for record in reversed(records)}
    verdicts = [
        Verdict(record, _kept_for(record, newest, released, named_by, pinned_by, bases))
        for record in records
    ]
    needed = bases.copy()
    for record in [*records, *removed]:
        needed |= {record["base_sha256"], *record["lock_sha256"].values()}
    files = sorted(_leftovers(store, records, needed))
    going = [*files]
    for record, kept_for in verdicts:
        if kept_for is None:
            going += store.files(record)
    pushed = {record["oci_digest"] for record in [*records, *removed]}
    pushed -= {record["oci_digest"] for record in newest.values()}
    pushed -= {f"sha256:{digest}" for digest in bases}
    return Plan(
        verdicts,
        files,
        sorted(tag for tag, digest in built.items() if digest in pushed),
        sum(_size_bytes(path) for path in going),
        dangling,
    )


def remove(store: ImageStore, decided: Plan) -> None:
    """Remove what the plan says; what is left after a kill is removed the next time.

    Hold the store's lock while calling it.
    """
    for tag in decided.built:
        builder.remove(tag)
    for verdict in decided.images:
        if verdict.kept_for is None:
            store.remove(verdict.record)
    for path in decided.files:
        # A work folder goes with its process too.
        with suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _kept_for(
    record: dict[str, Any],
    newest: Mapping[str, dict[str, Any]],
    released: set[str],
    named_by: Mapping[str, Path],
    pinned_by: Mapping[str, Path],
    bases: set[str],
) -> str | None:
    """Why the image stays, or None.

    newest: {name: record}. named_by, pinned_by: {digest: file}. bases: their digests. All digests
    are hexadecimal.
    """
    if newest[record["name"]] is record:
        return f"the newest of {record['name']}"
    if digests(record) & released:
        return "released"
    if digests(record) & bases:
        return "the base of a recipe or of another image"
    if named := digests(record) & named_by.keys():
        return f"named by {named_by[named.pop()]}"
    if pinned := digests(record) & pinned_by.keys():
        return f"pinned by {pinned_by[pinned.pop()]}"
    return None


def _leftovers(
    store: ImageStore, records: list[dict[str, Any]], needed: set[str]
) -> Iterator[Path]:
    """What killed pushes, builds and rebuilds left (none of the first two runs: the store is
    locked), and bases and packages whose sha256 is not in `needed`."""
    known = {path for record in records for path in store.files(record)}
    for pattern in ("sha256-*.sqsh", "sha256-*.sif"):
        yield from (path for path in store.folder.glob(pattern) if path not in known)
    yield from store.folder.glob(".push-*")
    yield from store.folder.glob(".build-*")
    yield from store.abandoned_work()
    for path in (store.folder / "bases").glob("*"):
        if path.name.startswith("sha256-") and path.stem.removeprefix("sha256-") not in needed:
            yield path
    # A killed download has a temporary name, which is not in `needed` either.
    yield from (path for path in (store.folder / "system").glob("*") if path.name not in needed)


def _size_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    size = 0
    # A work folder goes with its process, at any moment.
    with suppress(FileNotFoundError):
        for file in files:
            size += file.lstat().st_size
    return size


def _run_files(top: Path) -> Iterator[Path]:
    """The files below `top` that may name an image."""
    left, seen = [top], set()
    while left:
        folder = left.pop()
        try:
            status = folder.stat()
            # Links may form a circle.
            if (place := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(place)
            for entry in os.scandir(folder):
                if entry.name in _RUN_FILES:
                    yield folder / entry.name
                elif _is_folder(entry):
                    left.append(folder / entry.name)
        except FileNotFoundError as error:
            # A live run may have removed a folder below; `top` itself must exist.
            if folder == top:
                raise _unreadable(error, folder, _RUN_HINT) from None
        except OSError as error:
            raise _unreadable(error, error.filename or folder, _RUN_HINT) from None


def _edf_files(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(error, folder, _EDF_HINT) from None
    return [folder / name for name in names if name.endswith(".toml")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _digests_in(paths: Iterable[Path], hint: str, dangling: list[Path]) -> dict[str, Path]:
    """{64 hexadecimal digits: a file that holds them}. dangling: links to nothing are added."""
    found: dict[str, Path] = {}
    for path in paths:
        try:
            # Reading a FIFO would wait for ever.
            content = path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else b""
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise _unreadable(error, path, hint) from None
            if path.is_symlink():
                dangling.append(path)
            continue
        for digest in _DIGEST.findall(content):
            found.setdefault(digest.decode(), path)
    return found


def _unreadable(error: OSError, path: object, hint: str) -> PostTrainingError:
    reason = (error.strerror or str(error)).lower()
    return PostTrainingError(f"cannot be read: {reason}", where=str(path), hint=hint)
