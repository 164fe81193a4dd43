"""`post-training image compile PACKAGE`: a package is compiled on a node and becomes a wheel.

Some packages are published as source only, and compiling them takes hours of a processor. A build
of an image does not do that. The package is compiled once, in the built image, on a machine of the
image's kind. From then on its wheel is an input as every other one, pinned by its sha256:

    containers/PACKAGE/source.lock    the source archive
    containers/PACKAGE/compile        makes a wheel of it, by the compiler of the image it runs in
    the store: compiled/sha256-…/     the wheel, and compiled.json: how it was made
    containers/NAME/compiled.lock     names the wheel; part of the image's input hash

Only the wheel's sha256 is promised: the same package compiled again may give other bytes.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import atomic_directory, read_json, write_atomic, write_json
from post_training.core.hashing import sha256_file
from post_training.images import builder
from post_training.images.recipe import COMPILED_LOCK, SOURCE_DATE_EPOCH, SOURCE_LOCK, Recipe
from post_training.images.registry import download_sources
from post_training.images.selfcheck import locked_versions
from post_training.images.store import ImageStore

if TYPE_CHECKING:
    from post_training.images.build import BuiltImage

SCRIPT = "compile"
_SCHEMA = "post-training/compiled-wheel/1"
_RECORD = "compiled.json"
# What a wheel of compiled code has to fit to: torch and CUDA.
_FITS_TO = "requirements.lock"
_HEADER = """\
# Packages that were compiled on a node, by their wheels. `post-training image compile` writes this
# file; the image store has the wheels. Where it names none, the image has none.
"""
_ENTRY = re.compile(r"^(\S+)==(\S+) \\\n {4}--hash=sha256:([0-9a-f]{64})\n", re.MULTILINE)
# A kernel of flash-attn was seen to take 3.8 GB before its last step, and there are larger ones.
_JOB_BYTES = 8 << 30


@dataclass(frozen=True)
class CompiledPackage:
    """An entry of compiled.lock. sha256: of the wheel."""

    name: str
    version: str
    sha256: str


def read_compiled(recipe: Recipe) -> list[CompiledPackage]:
    """The packages that the recipe's compiled.lock names; none where it has no such file.

    Errors: UsageError for a line that is neither a comment nor part of an entry.
    """
    path = recipe.folder / COMPILED_LOCK
    if not path.exists():
        return []
    text = path.read_text()
    rest = _ENTRY.sub("", text).splitlines()
    if unknown := [line for line in rest if line.strip() and not line.startswith("#")]:
        raise UsageError(
            f"not an entry of `image compile`: {unknown[0]}",
            where=str(path),
            hint="an entry is two lines: `NAME==VERSION \\` and `    --hash=sha256:…`",
        )
    return [CompiledPackage(*found) for found in _ENTRY.findall(text)]


def lock_text(packages: Sequence[CompiledPackage]) -> str:
    """The content of compiled.lock."""
    entries = (
        f"{each.name}=={each.version} \\\n    --hash=sha256:{each.sha256}\n"
        for each in sorted(packages, key=lambda each: each.name)
    )
    return _HEADER + "".join(entries)


def link_compiled(recipe: Recipe, folder: Path, store: ImageStore) -> None:
    """Link the wheels that the recipe's compiled.lock names into `folder`, each checked.

    Errors: PostTrainingError for a wheel that is not in the store, that is damaged, or that was
    compiled for other packages than the recipe's.
    """
    path = recipe.folder / COMPILED_LOCK
    for each in read_compiled(recipe):
        kept = _kept(store, each.sha256)
        wheels = sorted(kept.glob("*.whl"))
        again = (
            f"take {each.name} out of {path}, then `post-training image build {recipe.name}` and "
            f"`post-training image compile {each.name}`"
        )
        if not wheels:
            raise PostTrainingError(
                f"its wheel of {each.name} is not in the image store: {kept}",
                where=str(path),
                hint=f"copy this folder from the store in which it was compiled; or {again}",
            )
        wheel = wheels[0]
        if (found := sha256_file(wheel)) != each.sha256:
            raise PostTrainingError(
                f"its sha256 is {found}, {COMPILED_LOCK} has {each.sha256}",
                where=str(wheel),
                hint=f"copy it anew from the store in which it was compiled; or {again}",
            )
        record = read_json(kept / _RECORD, _SCHEMA)
        if record["lock_sha256"][_FITS_TO] != sha256_file(recipe.locks[_FITS_TO]):
            raise PostTrainingError(
                f"{each.name} was compiled for the packages of another {_FITS_TO}",
                where=str(path),
                hint=again,
            )
        os.link(wheel, folder / wheel.name)


def compile_package(
    package: str,
    recipe: Recipe,
    image: "BuiltImage",
    store: ImageStore,
    num_jobs: int | None = None,
) -> Path:
    """Compile containers/PACKAGE in the built image and name its wheel in the recipe's
    compiled.lock; the wheel in the store. `check_compilable` comes before.

    image: of the recipe's present sources, in this machine's builder.
    num_jobs: files that are compiled at once; as many as processors and memory allow unless given.
    Errors: PostTrainingError where the source can't be had, the compiler fails or the wheel is not
    the locked version. Then neither the store nor the lock has changed.
    """
    folder = recipe.repository / "containers" / package
    lock, script = folder / SOURCE_LOCK, folder / SCRIPT
    jobs = num_jobs or default_jobs()
    with store.work_folder() as work:
        for name in ("sources", "script", "wheels"):
            (work / name).mkdir()
        tell(f"downloading the source that {lock} names …")
        download_sources(lock, work / "sources")
        shutil.copy(script, work / "script" / SCRIPT)
        tell(f"compiling {package} in {image.tag}, {jobs} files at once …")
        builder.run_offline(
            image.tag,
            [f"/script/{SCRIPT}", "/sources", "/wheels"],
            volumes={f"/{name}": work / name for name in ("sources", "script", "wheels")},
            environment={"MAX_JOBS": str(jobs), "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)},
        )
        wheel = _only_wheel(work / "wheels", lock)
        version = wheel.name.split("-")[1]
        made = CompiledPackage(package, version, sha256_file(wheel))
        record = {
            "schema": _SCHEMA,
            "name": package,
            "version": version,
            "wheel": wheel.name,
            "sha256": made.sha256,
            "source_lock_sha256": sha256_file(lock),
            "script_sha256": sha256_file(script),
            "image_oci_digest": image.oci_digest,
            "image_input_hash": image.identity["input_hash"],
            "lock_sha256": image.identity["lock_sha256"],
            "num_jobs": jobs,
            "builder": builder.version(),
            "compiled": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if not (kept := _kept(store, made.sha256)).exists():
            with atomic_directory(kept) as temporary:
                shutil.copyfile(wheel, temporary / wheel.name)
                write_json(temporary / _RECORD, record)
    others = [each for each in read_compiled(recipe) if each.name != package]
    write_atomic(recipe.folder / COMPILED_LOCK, lock_text([*others, made]))
    return kept / wheel.name


def check_compilable(package: str, recipe: Recipe) -> None:
    """Errors: UsageError where there is nothing to compile, where the recipe takes no compiled
    package or has this one, and where this machine is of another kind than the image."""
    folder = recipe.repository / "containers" / package
    if not (folder / SCRIPT).is_file():
        known = sorted(path.parent.name for path in folder.parent.glob(f"*/{SCRIPT}"))
        raise UsageError(
            f"nothing says how to compile {package!r}",
            where=str(folder.parent),
            hint=f"there are: {', '.join(known)}",
        )
    path = recipe.folder / COMPILED_LOCK
    if not path.exists():
        raise UsageError(
            f"the image {recipe.name} takes no compiled packages: there is no such file",
            where=str(path),
        )
    if any(each.name == package for each in read_compiled(recipe)):
        raise UsageError(
            f"names a wheel of {package} already",
            where=str(path),
            hint=f"take it out, then `post-training image build {recipe.name}`, to compile it anew",
        )
    if recipe.settings.is_emulated:
        raise UsageError(
            f"the image {recipe.name} is for {recipe.settings.platform}, and is emulated here: "
            "compiling would take days",
            where=str(recipe.folder),
            hint="run it on a node of that kind",
        )


def default_jobs(meminfo: str | None = None) -> int:
    """How many files this machine can compile at once: one a processor, with 8 GB for each.

    meminfo: the text of /proc/meminfo.
    """
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    [available_kib] = re.findall(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return max(1, min(len(os.sched_getaffinity(0)), int(available_kib) * 1024 // _JOB_BYTES))


def _only_wheel(folder: Path, lock: Path) -> Path:
    """The wheel that was made. Errors: PostTrainingError unless it is one of the locked version."""
    [version] = locked_versions(lock.read_text()).values()
    wheels = sorted(folder.iterdir())
    if [path.suffix for path in wheels] != [".whl"] or wheels[0].name.split("-")[1] != version:
        raise PostTrainingError(
            f"made {', '.join(path.name for path in wheels) or 'nothing'}, "
            f"and not one wheel of version {version}",
            where=str(lock.parent / SCRIPT),
        )
    return wheels[0]


def _kept(store: ImageStore, sha256: str) -> Path:
    return store.folder / "compiled" / f"sha256-{sha256}"
