"""`post-training storage setup | promote | doctor`: work on scratch, what must last elsewhere.

    artifacts/private -> SCRATCH/post-training           the user's own
              shared  -> SCRATCH/post-training-shared    the group reads and writes it
              store   -> PERMANENT/post-training         the same, and nothing there is deleted

The same relative paths then work for everybody. SCRATCH and PERMANENT are the site's
(slurm/sites), and hold the user's own variables.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import (
    atomic_directory,
    check_keys,
    copy_folder,
    read_json,
    write_json,
)
from post_training.core.process import run_tool
from post_training.records.artifact import read_artifact
from post_training.records.check import check_artifact
from post_training.slurm.site import Site

SCHEMA = "post-training/promoted/1"
LINKS = Path("artifacts")
_DAY_S = 24 * 3600


def setup(site_name: str, site: Site, group: str | None) -> dict[Path, Path]:
    """Make the folders and the links to them; what is there already stays as it is. {link: folder}.

    Errors: UsageError for a variable that is not set, and for a link that leads elsewhere.
    """
    targets = _targets(site_name, site)
    for name, target in targets.items():
        link = LINKS / name
        is_ours = link.is_symlink() and Path(os.readlink(link)) == target
        if not is_ours and (link.is_symlink() or link.exists()):
            raise UsageError(
                f"there already, and not a link to {target}",
                where=str(link),
                hint="move it away first",
            )
    for name, target in targets.items():
        target.mkdir(parents=True, exist_ok=True)
        if name == "private":
            target.chmod(0o700)
        else:
            _open_to_group(target, group)
        LINKS.mkdir(exist_ok=True)
        if not (LINKS / name).is_symlink():
            (LINKS / name).symlink_to(target)
    return {LINKS / name: target for name, target in targets.items()}


def promote(artifact: Path, name: str | None) -> Path:
    """Copy an artifact to artifacts/store, compare every file, and leave ARTIFACT.promoted.json;
    the copy.

    name: of the copy; by default RUN-ARTIFACT-fingerprint.
    Errors: UsageError when it is no artifact, was changed, or the place is taken.
    """
    record = read_artifact(artifact)
    fingerprint = record["fingerprint"]
    store = (LINKS / "store").resolve()
    if not store.is_dir():
        raise UsageError("no such folder", where=str(LINKS / "store"), hint="`storage setup` first")
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


@dataclass
class Endangered:
    """Files of a folder that a site deletes soon. days_left: until the first of them goes."""

    num_files: int
    size_bytes: int
    days_left: float


def find_endangered(
    folder: Path, after_days: int, margin_days: int
) -> list[tuple[Path, Endangered]]:
    """The folders below `folder` with files that go within margin_days, the first to go first.

    after_days: the site deletes what was not used for so long. Errors: UsageError for no folder.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder))
    now = time.time()
    endangered: dict[Path, Endangered] = {}
    for path, unused_days, size_bytes in _unused(folder.resolve(), now):
        if unused_days > after_days - margin_days:
            entry = endangered.setdefault(path.parent, Endangered(0, 0, float(after_days)))
            entry.num_files += 1
            entry.size_bytes += size_bytes
            entry.days_left = min(entry.days_left, round(after_days - unused_days, 1))
    return sorted(endangered.items(), key=lambda item: item[1].days_left)


def _pointer(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.promoted.json"


def _targets(site_name: str, site: Site) -> dict[str, Path]:
    if site.storage.permanent is None:
        raise UsageError("the site has no permanent storage", where=site_name)
    scratch, permanent = (_expanded(site_name, text) for text in
                          (site.storage.scratch, site.storage.permanent))  # fmt: skip
    return {
        "private": scratch / "post-training",
        "shared": scratch / "post-training-shared",
        "store": permanent / "post-training",
    }


def _expanded(site_name: str, text: str) -> Path:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UsageError(
                f"{match[1]} is not set, which its storage is named by (got {text})",
                where=site_name,
            )
        return os.environ[match[1]]

    return Path(re.sub(r"\$\{(\w+)\}", value, text))


def _open_to_group(folder: Path, group: str | None) -> None:
    """The group reads and writes all of it, also what is made there later by whatever umask."""
    if group is not None:
        shutil.chown(folder, group=group)
    folder.chmod(0o2770)
    if shutil.which("setfacl") is None:
        tell(f"warning: {folder}: setfacl is not installed, so new files follow each user's umask")
        return
    run_tool(
        ["setfacl", "--default", "--modify", "group::rwX,other::---", folder],
        hint="the file system must know ACLs",
    )


def _check_unchanged(folder: Path, problem: str) -> None:
    if faults := check_artifact(folder).faults:
        raise PostTrainingError(f"{problem}: {faults[0]}", where=str(folder))


def _unused(folder: Path, now: float) -> Iterator[tuple[Path, float, int]]:
    """(file, days since it was last read or written, bytes)."""
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(path, name)
            try:
                status = file.lstat()
            except FileNotFoundError:  # Gone since it was listed.
                continue
            yield file, (now - max(status.st_atime, status.st_mtime)) / _DAY_S, status.st_size
