"""sha256 of texts, values, files and folders: the only identity used anywhere."""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from post_training.core.files import refuse_special_file

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

    sha256: of one file; one that knows large files already is in core/known_digests.py.
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
