"""`post-training storage setup | doctor`: work on scratch, what must last elsewhere.

    artifacts/private -> SCRATCH/post-training           the user's own
              shared  -> SHARED                          one folder of the group, who read and write
              store   -> PERMANENT/post-training         the same, and nothing there is deleted

The same relative paths then work for everybody. SCRATCH, SHARED and PERMANENT are the site's
(slurm/sites), and hold the user's own variables. SHARED is one person's folder for all, so it is
named once for the group; unless named, it is SCRATCH/post-training-shared, each user's own.
records/promote.py copies artifacts to the store, upkeep.py keeps the folders in order.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from post_training.core.errors import UsageError, tell
from post_training.core.process import run_tool
from post_training.records.promote import LINKS
from post_training.slurm.site import Site
from post_training.slurm.upkeep import give_readers

_DAY_S = 24 * 3600


def setup(
    site_name: str,
    site: Site,
    group: str | None,
    shared: Path | None = None,
    readers: str | None = None,
) -> dict[Path, Path]:
    """Make the folders and the links to them; what is there already stays as it is. {link: folder}.

    shared: the folder that all of a group use, which may be another person's; None: the site's.
    readers: a second group, which may read what is shared and stored.
    Errors: UsageError for a variable that is not set, and for a link that leads elsewhere.
    """
    targets = _targets(site_name, site, shared)
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
        is_there = target.is_dir()
        target.mkdir(parents=True, exist_ok=True)
        if name == "private":
            target.chmod(0o700)
        elif is_there and target.stat().st_uid != os.geteuid():
            # Whose it is has opened it, or `storage repair` there does.
            _check_writable(target)
        else:
            _open_to_group(target, group)
            if readers is not None:
                give_readers(target, readers)
        LINKS.mkdir(exist_ok=True)
        if not (LINKS / name).is_symlink():
            (LINKS / name).symlink_to(target)
    return {LINKS / name: target for name, target in targets.items()}


def permanent_images(site_name: str, site: Site) -> Path:
    """The image store on the site's permanent storage. Errors: UsageError where it has none."""
    if site.storage.permanent is None:
        raise UsageError("the site has no permanent storage", where=site_name)
    return _expanded(site_name, site.storage.permanent) / "images"


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


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(
            f"is {folder.owner()}'s, and you may not write there",
            where=str(folder),
            hint=f"ask {folder.owner()} for `post-training storage repair {folder} --group GROUP`, "
            "with a group that you are in (`id -Gn`)",
        )


def _targets(site_name: str, site: Site, shared: Path | None) -> dict[str, Path]:
    if site.storage.permanent is None:
        raise UsageError("the site has no permanent storage", where=site_name)
    if shared is None and site.storage.shared is not None:
        shared = _expanded(site_name, site.storage.shared)
    scratch, permanent = (_expanded(site_name, text) for text in
                          (site.storage.scratch, site.storage.permanent))  # fmt: skip
    return {
        "private": scratch / "post-training",
        "shared": shared.absolute() if shared else scratch / "post-training-shared",
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
