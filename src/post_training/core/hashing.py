"""sha256 of texts, values, files and folders: the only identity used anywhere.

    sha256_*         of a text, of bytes, of a JSON value, of a file
    fingerprint      of an input: a file, a folder, an indexed dataset
    known_sha256     of a large file, read once and then known by device, inode, size, mtime, ctime
    WatchedInputs    the inputs of a run, which must not change while it goes on

A file is not remembered where its next change might not show in those five: when it was changed
less than two seconds before it was read (file systems count time in ticks, and two writes within
one tick have the same time), or while it was read. What they cannot show at all: a write to the
disk past the file system, or a clock of the machine that was set back.
"""

import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from post_training.core.errors import PostTrainingError
from post_training.core.files import refuse_special_file, user_cache, write_atomic

ARTIFACT_RECORD = "artifact.json"
# Reading a smaller file is as fast as reading its entry in the cache.
_SMALL_BYTES = 1 << 20
# The coarsest tick of a file system's clock, with room to spare.
_YOUNG_S = 2
_DIGEST = re.compile(r"[0-9a-f]{64}")

Sha256 = Callable[[Path], str]
Identity = tuple[int, ...]


def sha256_text(text: str) -> str:
    """Of the text's UTF-8, as hexadecimal digits; so are all hashes here."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_value(value: Any) -> str:
    """Of a JSON value; the order of keys does not count.

    Errors: ValueError for NaN and infinity.
    """
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False))


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_any(path: Path) -> str:
    """sha256 of a file: as `known_sha256` where it is large, read where it is small.

    Errors: FileNotFoundError.
    """
    return sha256_file(path) if path.stat().st_size < _SMALL_BYTES else known_sha256(path)


def known_sha256(path: Path, on_read: Callable[[int], None] = lambda size_bytes: None) -> str:
    """sha256 of the file, from the cache where it is known.

    Where the cache cannot be written, the file is read each time.
    path: may be /proc/self/fd/N, for a file that is open already.
    on_read: called with the file's size before it is read; not where the cache knows it.
    Errors: FileNotFoundError.
    """
    return _known(path, on_read)[0]


def _known(path: Path, on_read: Callable[[int], None]) -> tuple[str, Identity | None]:
    """As read_sha256, from the cache where it is known."""
    with open(path, "rb") as file:
        identity: Identity | None = file_identity(os.fstat(file.fileno()))
        if digest := _remembered(_entry(identity)):
            return digest, identity
        digest, identity = read_sha256(file, on_read)
    if identity is not None:
        # On a read-only home: correct all the same, only slower.
        with suppress(OSError):
            write_atomic(_entry(identity), digest)
    return digest, identity


def fingerprint(path: Path, sha256: Sha256 = sha256_file) -> str:
    """Of an input: a file's sha256; of a folder, `fingerprint_files` (hidden files count); of an
    indexed dataset, the same over PATH_*_document.{bin,idx} (Megatron's names).

    sha256: hashes one file; `sha256_of_any` where the cache may answer.
    Errors: FileNotFoundError; UsageError for a pipe, a socket or a device.
    """
    refuse_special_file(path)
    if path.is_dir():
        return fingerprint_files(hash_files(path, sha256))
    if not path.exists():
        files = sorted(path.parent.glob(f"{glob.escape(path.name)}_*_document.*"))
        if files:
            return fingerprint_files({file.name: sha256(file) for file in files})
    return sha256(path)


def fingerprint_files(hashes: dict[str, str]) -> str:
    """Of a folder, from its `hash_files`: sha256 over the sorted (path, sha256) pairs."""
    return sha256_value(sorted(hashes.items()))


def hash_files(folder: Path, sha256: Sha256 = sha256_file) -> dict[str, str]:
    """{relative path: sha256} of every file below `folder` but its artifact record, sorted."""
    return hash_named(folder, file_names(folder), sha256)


def hash_named(folder: Path, names: Sequence[str], sha256: Sha256 = sha256_file) -> dict[str, str]:
    """{name: sha256} of these files of the folder."""
    # Here and not above: the start of every container imports this file, and it takes 4 ms.
    from concurrent.futures import ThreadPoolExecutor

    # hashlib releases the GIL, so threads hash at the speed of the disk.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def file_names(folder: Path) -> list[str]:
    """Relative paths of every file below `folder` but its artifact record, sorted.

    Links to files are followed, and those to folders outside `folder`: what is read through them is
    a part of it. What a link within it leads to is there anyway.
    """
    return sorted(name for name in _names(folder, set()) if name != ARTIFACT_RECORD)


def _names(folder: Path, entered: set[Path]) -> Iterator[str]:
    """entered: the folders that links lead to, on the way here, resolved; none is entered twice."""
    own = folder.resolve()
    for path in folder.rglob("*"):  # which follows no links to folders
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            yield name
        elif path.is_symlink() and path.is_dir():
            target = path.resolve()
            if target not in entered and not target.is_relative_to(own):
                yield from (f"{name}/{below}" for below in _names(path, {*entered, own, target}))


class WatchedInputs:
    """The inputs of a run, by their keys in the configuration; every process has its own.

        add (fingerprints taken) -> the stage reads them -> check -> what was made of them is kept

    `check` hashes a file again only where its identity changed, or could not be trusted; so a file
    that was only touched counts as unchanged.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, tuple[Path, str]] = {}
        # None: an identity in which the file's next change might not show.
        self._files: dict[Path, tuple[Identity | None, str]] = {}

    def add(self, key: str, path: Path) -> str:
        """Take the input's fingerprint, keep and return it. Errors: as of `fingerprint`."""
        found = fingerprint(path, self._sha256)
        self._inputs[key] = path.absolute(), found
        return found

    def release(self, *prefixes: str) -> None:
        """Stop watching the inputs whose keys begin so: they were read to their end."""
        self._inputs = {
            key: value for key, value in self._inputs.items() if not key.startswith(prefixes)
        }

    def check(self) -> None:
        """Errors: PostTrainingError that names the file that changed since it was hashed."""
        for path, known in self._inputs.values():
            try:
                if fingerprint(path, self._same_sha256) != known:
                    raise _changed(self._missing_file(path))
            except FileNotFoundError:
                raise _changed(path) from None

    def _missing_file(self, folder: Path) -> Path:
        """The first known file of the folder that is gone; the folder where all are there."""
        return next((p for p in self._files if folder in p.parents and not p.exists()), folder)

    def _sha256(self, path: Path) -> str:
        if path.stat().st_size < _SMALL_BYTES:
            with open(path, "rb") as file:
                digest, identity = read_sha256(file)
        else:
            # Each attempt of a run asks anew, and all other ranks wait for the answer.
            digest, identity = _known(path, lambda size_bytes: None)
        self._files[path.absolute()] = identity, digest
        return digest

    def _same_sha256(self, path: Path) -> str:
        """The known digest of the file. Errors: PostTrainingError when it has another now."""
        path = path.absolute()
        identity, known = self._files.get(path, (None, ""))
        if identity is not None and identity == file_identity(path.stat()):
            return known
        if self._sha256(path) != known:
            raise _changed(path)
        return known


def read_sha256(
    file: BinaryIO, on_read: Callable[[int], None] = lambda size_bytes: None
) -> tuple[str, Identity | None]:
    """sha256 of a file that was just opened, and its identity; None instead of the identity where
    the file's next change might not show in it.

    on_read: called with the file's size before it is read.
    """
    identity, started = flushed_identity(file), time.time()
    on_read(os.fstat(file.fileno()).st_size)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_same = identity == file_identity(os.fstat(file.fileno()))
    return digest, identity if is_same and not _is_young(identity, started) else None


def file_identity(status: os.stat_result) -> Identity:
    """(device, inode, size, mtime, ctime): what changes when the file's bytes do."""
    times_ns = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times_ns)


def flushed_identity(file: BinaryIO) -> Identity:
    """The file's identity, once everything written to it through memory maps is on the disk.

    The first write to a mapped page changes the file's times; later ones do not until the page is
    flushed. Without the flush here, such a later write would not show.
    """
    with suppress(OSError):  # A read-only file system: nothing is waiting to be written.
        os.fsync(file.fileno())
    return file_identity(os.fstat(file.fileno()))


def _is_young(identity: Identity, now: float) -> bool:
    """Whether the file was changed so shortly before `now` that its next change might not show."""
    *_, mtime, ctime = (number / 1e9 for number in identity)
    # Anybody may set mtime, also to next year; ctime only the kernel or a file server sets.
    return abs(now - mtime) < _YOUNG_S or ctime > now - _YOUNG_S


def _entry(identity: Identity) -> Path:
    return user_cache() / "verified" / "-".join(str(number) for number in identity)


def _remembered(entry: Path) -> str | None:
    """The digest in this entry of the cache. None where there is none, or what is no digest: a full
    disk or a machine that went down may leave that."""
    try:
        text = entry.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _DIGEST.fullmatch(text) else None


def _changed(path: Path) -> PostTrainingError:
    return PostTrainingError(
        "changed after the run had taken its fingerprint",
        where=str(path),
        hint="nothing that was made from it is kept: start again when nothing writes to it",
    )
