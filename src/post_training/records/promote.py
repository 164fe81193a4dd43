"""Copy an artifact to storage that lasts, every file compared, and leave a pointer to the copy.

FOLDER                 the artifact, on scratch
FOLDER.promoted.json   where its copy is: `reproduce` takes it once the original is gone
"""

from datetime import UTC, datetime
from pathlib import Path

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import (
    atomic_directory,
    check_keys,
    copy_folder,
    read_json,
    write_json,
)
from post_training.records.artifact import read_artifact
from post_training.records.check import check_artifact

SCHEMA = "post-training/promoted/1"
# Below the working folder: links that `storage setup` makes.
LINKS = Path("artifacts")


def promote(artifact: Path, name: str | None) -> Path:
    """Copy an artifact to artifacts/store, compare every file, and leave ARTIFACT.promoted.json;
    the copy.

    name: of the copy; by default RUN-ARTIFACT-fingerprint.
    Errors: UsageError when it is no artifact, was changed, or the place is taken.
    """
    record = read_artifact(artifact)
    fingerprint = record["fingerprint"]
    store = find_store()
    folder = artifact.resolve()
    target = store / (name or f"{folder.parent.name}-{folder.name}-{fingerprint[:12]}")
    if target.exists():
        if read_artifact(target)["fingerprint"] != fingerprint:
            raise UsageError("another artifact is there", where=str(target), hint="give --name")
        _check_unchanged(target, "the copy that is there was changed")
    else:
        _check_unchanged(artifact, "changed since it was made")
        with atomic_directory(target) as copy:
            copy_folder(artifact, copy)
            _check_unchanged(copy, "the copy differs")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        _pointer(folder),
        {"schema": SCHEMA, "path": str(target), "fingerprint": fingerprint, "time": now},
    )
    return target


def promoted_copy(path: Path) -> Path | None:
    """Where the promoted copy of an artifact, or of what was in one, is said to be; None where
    neither it nor a folder above it was promoted. The copy itself is not checked.

    Errors: UsageError for a pointer that is no such record.
    """
    for folder in (path, *path.parents):
        if (pointer := _pointer(folder)).is_file():
            record = read_json(pointer, SCHEMA)
            check_keys(record, ("path",), pointer)
            return Path(record["path"]) / path.relative_to(folder)
    return None


def find_store() -> Path:
    """The folder that artifacts/store leads to. Errors: UsageError where it is not there."""
    store = (LINKS / "store").resolve()
    if not store.is_dir():
        raise UsageError(
            "no such folder",
            where=str(LINKS / "store"),
            hint="`post-training storage setup` makes it; in a container it must be mounted too",
        )
    return store


def _pointer(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.promoted.json"


def _check_unchanged(folder: Path, problem: str) -> None:
    if faults := check_artifact(folder).faults:
        raise PostTrainingError(f"{problem}: {faults[0]}", where=str(folder))
