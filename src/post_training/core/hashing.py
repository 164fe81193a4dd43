"""sha256 of texts, values, files and folders: the only identity used anywhere."""

import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from post_training.core.errors import PostTrainingError
from post_training.core.files import refuse_special_file, user_cache, write_atomic

ARTIFACT_RECORD = "artifact.json"


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_value(value: Any) -> str:
    """Hash of a JSON value; key order and whitespace don't count."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False))


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Sha256 = Callable[[Path], str]


def file_names(folder: Path) -> list[str]:
    """Relative paths of every file below `folder` but its artifact record, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != ARTIFACT_RECORD)


def hash_named(folder: Path, names: Sequence[str], sha256: Sha256 = sha256_file) -> dict[str, str]:
    """{name: sha256} of these files of the folder."""
    from concurrent.futures import ThreadPoolExecutor  # 4 ms that the runner's start can spare

    # hashlib releases the GIL, so threads hash at the speed of the disk.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def hash_files(folder: Path, sha256: Sha256 = sha256_file) -> dict[str, str]:
    """{relative path: sha256} of every file below `folder` but its artifact record, sorted."""
    return hash_named(folder, file_names(folder), sha256)


def fingerprint_files(hashes: dict[str, str]) -> str:
    """Fingerprint of a folder from `hash_files`: sha256 over its sorted (path, sha256) pairs."""
    return sha256_value(sorted(hashes.items()))


def fingerprint(path: Path, sha256: Sha256 = sha256_file) -> str:
    """Fingerprint of an input: a file's sha256; that of a folder's files (hidden ones too); or that
    of the indexed datasets PATH_*_document.{bin,idx} (Megatron's names), whose prefix it is.

    sha256: of one file; one that knows large files already is in core/hashing.py.
    Errors: FileNotFoundError; UsageError for what is no file and no folder.
    """
    refuse_special_file(path)
    if path.is_dir():
        return fingerprint_files(hash_files(path, sha256))
    if not path.exists():
        files = sorted(path.parent.glob(f"{glob.escape(path.name)}_*_document.*"))
        if files:
            return fingerprint_files({file.name: sha256(file) for file in files})
    return sha256(path)


# The sha256 of a large file, read once: the answer is cached by the file's identity.
#
# The cache key is device, inode, size, mtime and ctime. A file is not remembered where these may
# not show its next change: when it was changed less than two seconds before it was read (file
# systems count time in ticks, and two writes within one have one time), or while it was read. What
# the key cannot notice: whoever may write to the disk beside the file system, or set the machine's
# clock.


# A smaller file is read as fast as its entry in the cache.
_SMALL_BYTES = 1 << 20
_YOUNG_S = 2
_DIGEST = re.compile(r"[0-9a-f]{64}")

Identity = tuple[int, ...]


def file_identity(status: os.stat_result) -> Identity:
    """What changes when the file's bytes do."""
    return (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )


def known_sha256(path: Path, on_read: Callable[[int], None] = lambda size_bytes: None) -> str:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time.

    path: may be /proc/self/fd/N, for the file that is open already. on_read: called before the
    file is read, where its digest is not known.
    Errors: FileNotFoundError.
    """
    with open(path, "rb") as file:
        if digest := _remembered(_entry(file_identity(os.fstat(file.fileno())))):
            return digest
        digest, identity = read_sha256(file, on_read)
    if identity is not None:
        # A read-only home: correct all the same, only slower.
        with suppress(OSError):
            write_atomic(_entry(identity), digest)
    return digest


def read_sha256(
    file: BinaryIO, on_read: Callable[[int], None] = lambda size_bytes: None
) -> tuple[str, Identity | None]:
    """sha256 of a file that was just opened, and the identity by which it is known from now on;
    None where its next change might not show."""
    identity, started = flushed_identity(file), time.time()
    on_read(os.fstat(file.fileno()).st_size)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_same = identity == file_identity(os.fstat(file.fileno()))
    return digest, identity if is_same and not _is_young(identity, started) else None


def flushed_identity(file: BinaryIO) -> Identity:
    """The file's identity once what programs wrote through memory maps is on the disk.

    A mapped page changes the file's times when it is written first, and not again before it is
    flushed: without this, the second write would not show.
    """
    with suppress(OSError):  # Of a read-only file system: nothing is waiting there.
        os.fsync(file.fileno())
    return file_identity(os.fstat(file.fileno()))


def sha256_of_any(path: Path) -> str:
    """sha256 of a file of any size, from the cache where it is a large one.

    Errors: FileNotFoundError.
    """
    return sha256_file(path) if path.stat().st_size < _SMALL_BYTES else known_sha256(path)


def _entry(identity: Identity) -> Path:
    return user_cache() / "verified" / "-".join(str(number) for number in identity)


def _remembered(entry: Path) -> str | None:
    """None for an entry that is no digest too: a disk that was full, or a machine that went down,
    may leave one."""
    try:
        text = entry.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _DIGEST.fullmatch(text) else None


def _is_young(identity: Identity, now: float) -> bool:
    """Whether a file that is read from `now` on was changed so shortly before that its next change
    might not show."""
    *_, mtime, ctime = (number / 1e9 for number in identity)
    # Anybody may set mtime, to next year as well; ctime is the kernel's own, or a server's.
    return abs(now - mtime) < _YOUNG_S or ctime > now - _YOUNG_S


# The inputs of a run, which must stay what they were when their fingerprints were taken.
#
#     fingerprints taken -> the stage reads -> check -> what was made of them is kept
#
# A file is hashed again where its identity is another, or could not be trusted (known_digests.py);
# so a file that was only touched is no change.


class WatchedInputs:
    """By their keys, as they stand in the configuration. Every process of a run has its own."""

    def __init__(self) -> None:
        self._inputs: dict[str, tuple[Path, str]] = {}
        self._files: dict[Path, tuple[Identity | None, str]] = {}  # None: not to be trusted

    def add(self, key: str, path: Path) -> str:
        """The fingerprint. Errors: as of `fingerprint`."""
        found = fingerprint(path, self._sha256)
        self._inputs[key] = path.absolute(), found
        return found

    def release(self, *prefixes: str) -> None:
        """Inputs whose keys begin so were read to their end: they may change from now on."""
        self._inputs = {
            key: value for key, value in self._inputs.items() if not key.startswith(prefixes)
        }

    def check(self) -> None:
        """Errors: PostTrainingError that names the file that is not what was hashed."""
        for path, known in self._inputs.values():
            try:
                if fingerprint(path, self._same_sha256) != known:
                    raise _changed(self._gone(path))
            except FileNotFoundError:
                raise _changed(path) from None

    def _gone(self, folder: Path) -> Path:
        """The first file of the folder that is not there any more."""
        return next((p for p in self._files if folder in p.parents and not p.exists()), folder)

    def _sha256(self, path: Path) -> str:
        with open(path, "rb") as file:
            digest, identity = read_sha256(file)
        self._files[path.absolute()] = identity, digest
        return digest

    def _same_sha256(self, path: Path) -> str:
        """The digest of a file that is known. Errors: PostTrainingError when it is another."""
        path = path.absolute()
        identity, known = self._files.get(path, (None, ""))
        if identity is not None and identity == file_identity(path.stat()):
            return known
        if self._sha256(path) != known:
            raise _changed(path)
        return known


def _changed(path: Path) -> PostTrainingError:
    return PostTrainingError(
        "changed after the run had taken its fingerprint",
        where=str(path),
        hint="nothing that was made from it is kept: start again when nothing writes to it",
    )
