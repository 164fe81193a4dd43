"""What an image is made of besides our files: the bootstrapped base and the locked packages.

Both are kept in the store and counted by content, so a build needs the network once.
"""

import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, write_json
from post_training.core.hashing import sha256_file, sha256_text
from post_training.core.process import run_tool
from post_training.images.recipe import SOURCE_DATE_EPOCH, Recipe
from post_training.images.store import ImageStore

SUITE = "bookworm"
# Debian 12 has glibc 2.36 and Python 3.11.
_PYTHON = "3.11"
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)] + [
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
]
# What is published as source only; the Dockerfile builds it.
_SOURCE_LOCK = "source.lock"
# Where the CPU build of torch is published, asked when the configured index doesn't have it.
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                 "--require-hashes", "--disable-pip-version-check"]  # fmt: skip


def ensure_base(recipe: Recipe, store: ImageStore) -> dict[str, Any]:
    """The base of `recipe`: {"sha256", "file", "suite", "packages": {name: version}}.

    Bootstrapped from Debian packages once per package list and then taken from the store, so a
    mirror that moves never changes an image under a recipe that did not.
    """
    packages = _package_list(recipe.folder / "base.packages")
    key = sha256_text(f"{SUITE} {SOURCE_DATE_EPOCH} {' '.join(packages)}")
    record_path = store.folder / "bases" / f"recipe-{key}.json"
    if record_path.exists():
        base = json.loads(record_path.read_text())
        if (store.folder / base["file"]).exists():
            return base
    print(f"bootstrapping the base from Debian {SUITE} …", file=sys.stderr)
    record_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=record_path.parent) as temporary:
        tar = Path(temporary) / "base.tar"
        run_tool(
            ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}",
             SUITE, tar],
            env={**os.environ, "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)},
            hint="it needs a Debian mirror: is one configured in /etc/apt?",
        )  # fmt: skip
        digest = sha256_file(tar)
        versions = _installed_packages(tar)
        file = tar.replace(record_path.parent / f"sha256-{digest}.tar")
    base = {
        "sha256": digest,
        "file": str(file.relative_to(store.folder)),
        "suite": SUITE,
        "packages": versions,
    }
    write_json(record_path, base)
    return base


def ensure_wheels(recipe: Recipe, store: ImageStore) -> Path:
    """A folder with exactly what the recipe's locks name, checked against their hashes.

    Wheels, and the source archives of what source.lock names.
    """
    key = sha256_text("".join(path.read_text() for path in recipe.locks.values()))
    folder = store.folder / "wheels" / recipe.name / key
    if folder.exists():
        return folder
    for old in sorted(folder.parent.glob("*/")):
        shutil.rmtree(old)
    with atomic_directory(folder) as temporary:
        locks = dict(recipe.locks)
        source_lock = locks.pop(_SOURCE_LOCK, None)
        for name, lock in locks.items():
            print(f"downloading the wheels of {name} …", file=sys.stderr)
            _download_wheels(lock, temporary)
        if source_lock:
            print(f"downloading the sources of {_SOURCE_LOCK} …", file=sys.stderr)
            _download_sources(source_lock, temporary)
    return folder


def _download_sources(lock: Path, folder: Path) -> None:
    """Fetch source archives into `folder`, where the wheels of the other locks are.

    pip runs each archive's setup.py for its metadata. It gets the locked setuptools for that, so
    that nothing unlocked is fetched or run.
    """
    with tempfile.TemporaryDirectory() as unpacked:
        for wheel in folder.glob("setuptools-*.whl"):
            shutil.unpack_archive(wheel, unpacked, "zip")
        run_tool(
            [*_PIP_DOWNLOAD, "--no-binary", ":all:", "--no-build-isolation",
             "--dest", str(folder), "-r", str(lock)],
            env={**os.environ, "PYTHONPATH": unpacked},
        )  # fmt: skip


def _download_wheels(lock: Path, folder: Path) -> None:
    command = [*_PIP_DOWNLOAD, "--only-binary", ":all:", "--python-version", _PYTHON,
               "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none",
               *(word for platform in _PLATFORMS for word in ("--platform", platform)),
               "--dest", str(folder), "-r", str(lock)]  # fmt: skip
    try:
        run_tool(command)
    except PostTrainingError as error:
        if "torch==" not in error.problem:
            raise
        print(f"torch is not in the configured index; asking {_TORCH_INDEX}", file=sys.stderr)
        run_tool([*command, "--extra-index-url", _TORCH_INDEX])


def _package_list(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return sorted(line for line in lines if line)


def _installed_packages(base_tar: Path) -> dict[str, str]:
    with tarfile.open(base_tar) as archive:
        status = archive.extractfile("./var/lib/dpkg/status")
        return parse_dpkg_status(status.read().decode())


def parse_dpkg_status(status: str) -> dict[str, str]:
    """{package: version} from a dpkg status file."""
    packages = {}
    for paragraph in status.split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in paragraph.splitlines()
            if not line.startswith(" ") and ": " in line
        )
        if "Package" in fields:
            packages[fields["Package"]] = fields["Version"]
    return packages
