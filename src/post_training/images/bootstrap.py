"""A Debian root file system as a tar, with mmdebstrap: equal package versions give equal bytes.

mmdebstrap leaves this machine's name and resolver in it, and the addresses it asked; those files
are given one content, whatever machine and mirror it was made with.
"""

import os
import shlex
import signal
import tarfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from post_training.core.process import run_tool
from post_training.images.recipe import SOURCE_DATE_EPOCH

SUITE = "bookworm"
_COMPONENT = "main"
# (suite, archive); the archive's folder has the same name at a mirror and at the snapshot service.
_ARCHIVES = (
    (SUITE, "debian"),
    (f"{SUITE}-updates", "debian"),
    (f"{SUITE}-security", "debian-security"),
)
_MIRRORS = {
    "debian": "http://deb.debian.org/debian",
    "debian-security": "http://security.debian.org/debian-security",
}
# Every state that Debian's archive ever had, by time: snapshot.debian.org or a copy of it.
SNAPSHOT_VARIABLE = "POST_TRAINING_DEBIAN_SNAPSHOT"
_SNAPSHOT_SERVICE = "http://snapshot.debian.org/archive"
_SNAPSHOT_TIMEOUT_S = 15
# Old states were signed for a time that has passed, by keys that may have.
_SNAPSHOT_OPTIONS = (
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=Apt::Key::gpgvcommand "/usr/libexec/mmdebstrap/gpgvnoexpkeysig"',
)


def bootstrap(packages: Sequence[str], target: Path, *, snapshot: str | None = None) -> None:
    """Write the tar of minbase and `packages`, in the versions that the archive has.

    snapshot: the archive's state then, as 20260101T000000Z; else the mirrors' present one.
    Errors: PostTrainingError where Debian cannot be reached.
    """
    roots = _MIRRORS
    if snapshot:
        service = _snapshot_service()
        roots = {archive: f"{service}/{archive}/{snapshot}" for archive in _MIRRORS}
    run_tool(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}",
         *(_SNAPSHOT_OPTIONS if snapshot else ()), f"--customize-hook={_fix_files()}",
         SUITE, target, *_sources(roots)],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)},
        hint="it needs the network: is a proxy to be configured in /etc/apt?",
        ends_with_us=signal.SIGTERM,
    )  # fmt: skip


def snapshot_is_reachable(snapshot: str) -> bool:
    """Asked before the bootstrap, which would try for minutes."""
    address = f"{_snapshot_service()}/debian/{snapshot}/dists/{SUITE}/InRelease"
    try:
        with urllib.request.urlopen(address, timeout=_SNAPSHOT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def bootstrap_version() -> str:
    return run_tool(["mmdebstrap", "--version"])


def installed_packages(base_tar: Path) -> dict[str, str]:
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
