"""What an image is made of besides our files: a base, and the packages that its locks name.

Both are kept in the store and named by their content, so a build needs the network once.

    bases/sha256-<hex>.tar           every bootstrapped base that an image was made of
    bases/instead-of-<hex>.json      which base was made when the locked one could not be had
    wheels/NAME/<hex>/               what the locks of recipe NAME name

A bootstrapped base is a Debian root file system, made by mmdebstrap: equal package versions give
equal bytes. mmdebstrap leaves this machine's name, resolver and mirrors in it; those files get one
content, whatever machine and mirror it was made with.
"""

import http.client
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tarfile
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import atomic_directory, sync, write_json
from post_training.core.hashing import sha256_file, sha256_text
from post_training.core.process import run_tool
from post_training.images.compiled import link_compiled, read_compiled
from post_training.images.identity import image_digest
from post_training.images.own_base import read_own_base
from post_training.images.recipe import (
    BASE_LOCK,
    COMPILED_LOCK,
    SOURCE_DATE_EPOCH,
    SOURCE_LOCK,
    BaseLock,
    Recipe,
    RecipeSettings,
    load_recipe,
    moved_packages,
    read_base_lock,
    write_base_lock,
)
from post_training.images.registry import (
    TORCH_INDEX,
    download_sources,
    read_package_names,
    read_registry_base,
)
from post_training.images.store import ImageStore

SUITE = "bookworm"
BASE_PACKAGES = "base.packages"
# Its name in the build context.
NATIVE_ROOT = "native.tar"
_COMPONENT = "main"
# (suite, archive); an archive's folder has the same name at a mirror and at the snapshot service.
_ARCHIVES = (
    (SUITE, "debian"),
    (f"{SUITE}-updates", "debian"),
    (f"{SUITE}-security", "debian-security"),
)
_MIRRORS = {
    "debian": "http://deb.debian.org/debian",
    "debian-security": "http://security.debian.org/debian-security",
}
# Serves every past state of Debian's archive, by time: snapshot.debian.org or a copy of it.
SNAPSHOT_VARIABLE = "POST_TRAINING_DEBIAN_SNAPSHOT"
_SNAPSHOT_SERVICE = "http://snapshot.debian.org/archive"
_SNAPSHOT_TIMEOUT_S = 15
# The signatures of a past state have expired by now, and maybe the keys that made them.
_SNAPSHOT_OPTIONS = (
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=Apt::Key::gpgvcommand "/usr/libexec/mmdebstrap/gpgvnoexpkeysig"',
)
_PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                 "--require-hashes", "--disable-pip-version-check"]  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A bootstrapped base in the store, an image in a registry, or one of ours.

    file: the tar of a bootstrapped one; None for a registry's.
    packages: {name: version} of a bootstrapped one.
    moved: a line for each package of a bootstrapped one that is not as locked.
    reference: `NAME@sha256:…` of a registry's.
    ours: what base.lock says, where it is one of our images.
    """

    sha256: str
    file: Path | None
    packages: dict[str, str]
    moved: list[str]
    reference: str | None = None
    ours: dict[str, Any] | None = None

    @property
    def is_locked(self) -> bool:
        return not self.moved


def ensure_base(recipe: Recipe, store: ImageStore) -> Base:
    """The base that the recipe's base.lock names, wherever that can still be had.

    From the store; else made from the mirrors as they are; else from a snapshot service. Where
    Debian has moved on and no snapshot can be reached, the newer base is used, and the image's
    record says `unlocked`. Its other bytes give another input hash, so no image changes silently.
    """
    if recipe.settings.is_over_ours:
        lock = read_own_base(recipe)
        moved = [] if lock["base"] == "locked" else [f"the base of {lock['name']}"]
        if moved:
            _say(f"base: unlocked (that of {lock['name']} {lock['version']} is not as locked)")
        return Base(lock["oci_digest"].removeprefix("sha256:"), None, {}, moved, ours=lock)
    if image := recipe.settings.base:
        reference = read_registry_base(recipe.folder / BASE_LOCK, image, recipe.settings.platform)
        return Base(reference.rpartition(":")[2], None, {}, [], reference)
    include = read_package_names(recipe.folder / BASE_PACKAGES)
    lock = read_base_lock(
        recipe.folder / BASE_LOCK, suite=SUITE, epoch=SOURCE_DATE_EPOCH, include=include
    )
    locked = Base(lock.sha256, _base_path(store, lock.sha256), lock.packages, [])
    if locked.file.exists():
        _check_file(locked)
        return locked
    remembered = store.folder / f"bases/instead-of-{lock.sha256}.json"
    if remembered.exists():
        kept = json.loads(remembered.read_text())
        file = _base_path(store, kept["sha256"])
        base = Base(kept["sha256"], file, kept["packages"], kept["moved"])
        if base.file.exists():
            _say(f"base: unlocked ({len(base.moved)} packages are not those of {BASE_LOCK})")
            _check_file(base)
            return base
    base = _make_base(lock, store, recipe.settings.platform)
    if not base.is_locked:
        kept = {"sha256": base.sha256, "packages": base.packages, "moved": base.moved}
        write_json(remembered, kept)
    return base


def ensure_native_root(recipe: Recipe, base: Base, store: ImageStore) -> Path | None:
    """The tar of a Debian root whose programs this machine runs without emulation.

    It is the base itself, or the one of another recipe, for this machine's processor. Its Python
    installs the image's packages (containers/steps/native-python), so it has the same version:
    another would compile other bytecode. None where the Dockerfile does not ask for it.
    Errors: UsageError where no recipe has such a base.
    """
    if NATIVE_ROOT not in (recipe.folder / "Dockerfile").read_text():
        return None
    if not recipe.settings.is_emulated:
        return base.file
    for folder in sorted(recipe.folder.parent.glob(f"*/{BASE_PACKAGES}")):
        other = load_recipe(folder.parent.name, recipe.repository)
        if not other.settings.is_emulated:
            native = ensure_base(other, store)
            if _python(native) == _python(base):
                return native.file
            raise UsageError(
                f"its base has Python {_python(base)}, {other.name}'s has {_python(native)}",
                where=str(recipe.folder / BASE_LOCK),
                hint=f"lock both anew: `post-training image lock {recipe.name}`",
            )
    raise UsageError(
        f"no recipe has a base for {platform.machine()}, whose Python installs the packages",
        where=str(recipe.folder.parent),
    )


def _python(base: Base) -> str:
    """Debian's version of the interpreter, 3.11.2-6+deb12u6; without what a rebuild adds."""
    name = next(name for name in base.packages if re.fullmatch(r"python3\.\d+-minimal", name))
    return base.packages[name].partition("+b")[0]


def lock_base(recipe: Recipe, store: ImageStore) -> Path:
    """Bootstrap a base from the mirrors as they are now, keep it in the store and write base.lock.

    Returns the lock's path. The base of the old lock stays in the store.
    """
    include = read_package_names(recipe.folder / BASE_PACKAGES)
    # Taken before the mirrors are read: the snapshot of this time must not be newer than they are.
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    sha256, packages = _bootstrap(include, store, recipe.settings.platform)
    path = recipe.folder / BASE_LOCK
    write_base_lock(
        path,
        BaseLock(sha256, SUITE, SOURCE_DATE_EPOCH, include, now, mmdebstrap_version(), packages),
    )
    return path


def ensure_wheels(recipe: Recipe, store: ImageStore) -> Path:
    """A folder with exactly the wheels and source archives that the recipe's locks name, downloaded
    where it is missing and checked by their hashes."""
    named = [path.read_text() for path in recipe.package_locks.values()]
    if read_compiled(recipe):
        named.append(recipe.locks[COMPILED_LOCK].read_text())
    key = sha256_text("".join(named))
    folder = store.folder / "wheels" / recipe.name / key
    if folder.exists():
        return folder
    before = sorted(folder.parent.glob("*/"))
    with atomic_directory(folder) as temporary:
        link_compiled(recipe, temporary, store)
        locks = dict(recipe.package_locks)
        _keep_locked(before, temporary, locks.values())
        source_lock = locks.pop(SOURCE_LOCK, None)
        for name, lock in locks.items():
            _say(f"downloading the wheels of {name} …")
            _download_wheels(lock, temporary, recipe.settings)
        if source_lock:
            _say(f"downloading the sources of {SOURCE_LOCK} …")
            download_sources(source_lock, temporary)
    for old in before:
        shutil.rmtree(old)
    return folder


def bootstrap(
    packages: Sequence[str], target: Path, image_platform: str, *, snapshot: str | None = None
) -> None:
    """Write the tar of Debian's minbase and `packages`, in the versions that the archive has.

    image_platform: as linux/arm64. Another processor's needs qemu in the kernel: packages run their
    own programs while they are installed.
    snapshot: the time of the archive's state to take, as 20260101T000000Z; unless given, the
    mirrors' present state.
    Errors: PostTrainingError where Debian cannot be reached.
    """
    roots = _MIRRORS
    if snapshot:
        service = _snapshot_service()
        roots = {archive: f"{service}/{archive}/{snapshot}" for archive in _MIRRORS}
    run_tool(
        ["mmdebstrap", "--quiet", "--variant=minbase",
         f"--architectures={image_platform.removeprefix('linux/')}",
         f"--include={','.join(packages)}",
         *(_SNAPSHOT_OPTIONS if snapshot else ()), f"--customize-hook={_fix_files()}",
         SUITE, target, *_sources(roots)],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)},
        hint="it needs the network: is a proxy to be configured in /etc/apt?",
        ends_with_us=signal.SIGTERM,
    )  # fmt: skip


def snapshot_is_reachable(snapshot: str) -> bool:
    """Whether the snapshot service answers; a bootstrap would try for minutes."""
    address = f"{_snapshot_service()}/debian/{snapshot}/dists/{SUITE}/InRelease"
    try:
        with urllib.request.urlopen(address, timeout=_SNAPSHOT_TIMEOUT_S):
            return True
    except (http.client.HTTPException, OSError, ValueError):
        return False


def mmdebstrap_version() -> str:
    return run_tool(["mmdebstrap", "--version"])


def read_installed_packages(base_tar: Path) -> dict[str, str]:
    """{package: version} of a bootstrapped tar."""
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


def _make_base(lock: BaseLock, store: ImageStore, image_platform: str) -> Base:
    """Bootstrap the locked base, from the mirrors or a snapshot; else the mirrors' newer one."""
    sha256, packages = _bootstrap(lock.include, store, image_platform)
    if sha256 == lock.sha256:
        return Base(sha256, _base_path(store, sha256), packages, [])
    moved = moved_packages(lock.packages, packages)
    _say(f"Debian's mirrors no longer have the base that {BASE_LOCK} names:")
    for line in moved or [f"the same packages, other bytes ({lock.mmdebstrap} made the lock's)"]:
        _say(f"  {line}")
    if moved and snapshot_is_reachable(lock.snapshot):
        _say(f"making it from the snapshot of {lock.snapshot}")
        try:
            then_sha256, then_packages = _bootstrap(
                lock.include, store, image_platform, snapshot=lock.snapshot
            )
        except PostTrainingError as error:
            # The service limits how much one machine may fetch; a build goes on without it.
            _say(str(error))
        else:
            if then_sha256 == lock.sha256:
                return Base(then_sha256, _base_path(store, then_sha256), then_packages, [])
            _say(f"the snapshot's base is {then_sha256}, not the locked {lock.sha256}")
    _say("going on with the moved base; the image's record says `base: unlocked`")
    return Base(sha256, _base_path(store, sha256), packages, moved or ["other bytes"])


def _bootstrap(
    include: list[str], store: ImageStore, image_platform: str, *, snapshot: str | None = None
) -> tuple[str, dict[str, str]]:
    """Make a base and keep it in the store; (its sha256, {package: version})."""
    _say(f"bootstrapping the base from Debian {SUITE} …")
    store.remove_abandoned_work()
    with store.work_folder("bases") as temporary:
        tar = temporary / "base.tar"
        bootstrap(include, tar, image_platform, snapshot=snapshot)
        sha256, packages = sha256_file(tar), read_installed_packages(tar)
        sync(tar)
        tar.replace(_base_path(store, sha256))
    return sha256, packages


def _check_file(base: Base) -> None:
    if (found := image_digest(base.file).sha256) != base.sha256:
        raise PostTrainingError(
            f"sha256 is {found}, not what its name says",
            where=str(base.file),
            hint="the file is damaged: remove it, and the base is made again",
        )


def _base_path(store: ImageStore, sha256: str) -> Path:
    return store.folder / f"bases/sha256-{sha256}.tar"


def _snapshot_service() -> str:
    return os.environ.get(SNAPSHOT_VARIABLE, _SNAPSHOT_SERVICE).rstrip("/")


def _sources(roots: dict[str, str]) -> list[str]:
    return [f"deb {roots[archive]} {suite} {_COMPONENT}" for suite, archive in _ARCHIVES]


def _fix_files() -> str:
    """A shell command for mmdebstrap, run with the root file system as $1."""
    sources = " ".join(shlex.quote(line) for line in _sources(_MIRRORS))
    return (
        'cd "$1/etc" && rm -f hostname resolv.conf apt/apt.conf.d/99mmdebstrap && '
        f": >hostname && : >resolv.conf && printf '%s\\n' {sources} >apt/sources.list && "
        "chmod 644 hostname resolv.conf apt/sources.list"
    )


def _keep_locked(before: Iterable[Path], folder: Path, locks: Iterable[Path]) -> None:
    """Link into `folder` what the folders `before` have of the locks: pip downloads it no more.

    Most of a changed lock is as it was, and gh200's wheels have four gigabytes.
    """
    wanted = set(re.findall(r"sha256:([0-9a-f]{64})", "".join(path.read_text() for path in locks)))
    for path in (path for old in before for path in sorted(old.iterdir())):
        if not (folder / path.name).exists() and sha256_file(path) in wanted:
            os.link(path, folder / path.name)


def _download_wheels(lock: Path, folder: Path, settings: RecipeSettings) -> None:
    tag = f"cp{settings.python.replace('.', '')}"
    platforms = settings.wheel_platforms
    command = [*_PIP_DOWNLOAD, "--only-binary", ":all:", "--python-version", settings.python,
               "--implementation", "cp", "--abi", tag, "--abi", "abi3", "--abi", "none",
               *(word for platform in platforms for word in ("--platform", platform)),
               "--dest", str(folder), "-r", str(lock)]  # fmt: skip
    try:
        run_tool(command)
    except PostTrainingError as error:
        if "torch==" not in error.problem:
            raise
        _say(f"torch is not in the configured index; asking {TORCH_INDEX}")
        run_tool([*command, "--extra-index-url", TORCH_INDEX])


def _say(text: str) -> None:
    tell(text)
