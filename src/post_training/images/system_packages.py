"""containers/NAME/system.in and system.lock: what a registry base lacks of its distribution.

apt in the base itself says which files an installation would take, and from where; they are locked
by sha256, fetched before the build and installed in it without a network. A distribution's mirror
keeps only the newest versions: one that has gone is said, and the lock must be made again.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, read_json, write_json
from post_training.core.hashing import sha256_file
from post_training.images.builder import run_in
from post_training.images.package_index import download
from post_training.images.registry_base import UNRESOLVED

ASKED, LOCKED = "system.in", "system.lock"
_SCHEMA = "post-training/system-lock/1"
_FILE = re.compile(r"'(\S+)' (\S+\.deb) \d+ \S+")


def lock_system_packages(folder: Path, base: str, platform: str, working: Path) -> None:
    """Ask apt in `base` and write system.lock. working: where the packages are fetched to.

    Errors: PostTrainingError where the base cannot be pulled, run, or reach its mirror.
    """
    names = package_names(folder / ASKED)
    ask = "apt-get update -qq >&2 && apt-get install --no-install-recommends --print-uris -qq"
    said = run_in(base, platform, f"{ask} {' '.join(names)}")
    files = parse_files(said)
    for file in files:
        # apt shows MD5 here, whose word is not enough; its index was signed, and we hash.
        target = working / file["file"]
        download(file["address"], target, allowed=None)
        file["sha256"] = sha256_file(target)
    write_json(folder / LOCKED, {"schema": _SCHEMA, "base": base, "asked": names, "files": files})


def leave_unresolved(folder: Path, reason: str) -> None:
    """A lock that says why there is none; one that was made before is kept."""
    if not (folder / LOCKED).exists():
        lock = {"schema": _SCHEMA, "base": UNRESOLVED, "asked": package_names(folder / ASKED)}
        write_json(folder / LOCKED, {**lock, "reason": reason, "files": []})


def read_system_lock(folder: Path, base: str) -> list[dict[str, str]]:
    """The locked files. Errors: UsageError for a lock that is missing, unresolved or of another
    base or list."""
    path = folder / LOCKED
    hint = f"`post-training image lock {folder.name}` where its base can be pulled and run"
    try:
        lock: dict[str, Any] = read_json(path, _SCHEMA)
    except FileNotFoundError:
        raise UsageError("no such lock", where=str(path), hint=hint) from None
    if lock["base"] == UNRESOLVED:
        raise UsageError(f"{UNRESOLVED}: {lock['reason']}", where=str(path), hint=hint)
    for key, wanted in {"base": base, "asked": package_names(folder / ASKED)}.items():
        if lock[key] != wanted:
            problem = f"made for {key} {lock[key]}, wanted is {wanted}"
            raise UsageError(problem, where=str(path), hint=hint)
    return lock["files"]


def ensure_system_packages(files: list[dict[str, str]], lock: Path, store_folder: Path) -> Path:
    """A folder with exactly the locked files, each checked by its hash. It is named for the lock's
    own sha256, by which the records of images name it."""
    folder = store_folder / "system" / sha256_file(lock)
    if not folder.exists():
        with atomic_directory(folder) as temporary:
            for file in files:
                try:
                    download(file["address"], temporary / file["file"], {file["sha256"]})
                except PostTrainingError as error:
                    hint = "its mirror has moved on: `post-training image lock` makes a new lock"
                    raise PostTrainingError(error.problem, where=error.where, hint=hint) from None
    return folder


def parse_files(said: str) -> list[dict[str, str]]:
    """[{"file", "address"}] from `apt-get install --print-uris`, sorted by file."""
    found = [{"file": unquote(file), "address": address} for address, file in _FILE.findall(said)]
    return sorted(found, key=lambda file: file["file"])


def package_names(path: Path) -> list[str]:
    """The names in a list of packages, sorted; `#` begins a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return sorted(line for line in lines if line)
