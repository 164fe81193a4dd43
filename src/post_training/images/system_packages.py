"""containers/NAME/system.in and system.lock: what a registry base lacks of its distribution.

apt in the base itself says which files an installation would take, from where, and which sha256 the
signed index gives them. By that they are fetched before the build, and installed in it without a
network. What is signed is for apt to say, by the base's own keys and sources: an index that is
unsigned, signed by another key, past its time or not to be had is an error. A distribution's mirror
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
_FILE = re.compile(r"'(\S+)' (\S+\.deb) \d+ ?(\S*)")
# By itself apt prints MD5, goes on when an index cannot be had, and may be told by the base's own
# settings to take unsigned ones.
_OPTIONS = (
    "-qq -o Acquire::ForceHash=SHA256 -o APT::Update::Error-Mode=any "
    "-o Acquire::AllowInsecureRepositories=false -o Acquire::AllowWeakRepositories=false "
    "-o Acquire::AllowDowngradeToInsecureRepositories=false"
)


def lock_system_packages(folder: Path, base: str, platform: str, working: Path) -> None:
    """Ask apt in `base` and write system.lock. working: where the packages are fetched to.

    Errors: PostTrainingError where the base cannot be pulled, run, or reach its mirror.
    """
    names = package_names(folder / ASKED)
    install = f"apt-get {_OPTIONS} install --no-install-recommends --print-uris {' '.join(names)}"
    files = parse_files(run_in(base, platform, f"apt-get {_OPTIONS} update >&2 && {install}"))
    for file in files:
        # Not kept: a lock names only what its mirror has.
        download(file["address"], working / file["file"], {file["sha256"]})
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
    """[{"file", "address", "sha256"}] from `apt-get install --print-uris`, sorted by file.

    Errors: PostTrainingError for a file whose index has no sha256.
    """
    found = []
    for address, name, said_hash in _FILE.findall(said):
        kind, _, digest = said_hash.partition(":")
        if kind != "SHA256" or not re.fullmatch("[0-9a-f]{64}", digest):
            raise PostTrainingError(
                f"apt's index has no sha256 of it (got {said_hash!r})", where=name
            )
        found.append({"file": unquote(name), "address": address, "sha256": digest})
    return sorted(found, key=lambda file: file["file"])


def package_names(path: Path) -> list[str]:
    """The names in a list of packages, sorted; `#` begins a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return sorted(line for line in lines if line)
