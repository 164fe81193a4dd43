"""Files of a base's distribution: named by the base's own apt, fetched by hash."""

import json
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import sha256_file
from post_training.images.system_packages import (
    ensure_system_packages,
    leave_unresolved,
    lock_system_packages,
    read_system_lock,
)

BASE = "registry.example/cuda@sha256:" + "1" * 64
# Of `buildah run`, what apt in the base prints; the other verbs only name a container.
BUILDAH = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/asked"
case $1 in from) echo working ;; run) cat "$here/said" ;; esac
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A recipe's folder; apt in its base names two files."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in ("bin", "mirror", "gh200", "working"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/buildah").write_text(BUILDAH)
    (tmp_path / "bin/buildah").chmod(0o755)
    said = ""
    for name in ("zlib_1%3a1.3_arm64.deb", "patch_2.7_arm64.deb"):
        (tmp_path / "mirror" / name.replace("%3a", ":")).write_text(name)
        said += f"'file://{tmp_path}/mirror/{name}' {name} 12 MD5Sum:0\n"
    (tmp_path / "bin/said").write_text(said)
    (tmp_path / "gh200/system.in").write_text("# comment\npatch\nzlib\n")
    return tmp_path / "gh200"


def lock(folder: Path) -> None:
    lock_system_packages(folder, BASE, "linux/arm64", folder.parent / "working")


def test_system_lock_names_files_by_sha256_and_the_build_fetches_them(folder, tmp_path):
    lock(folder)
    files = read_system_lock(folder, BASE)
    mirror = {path.name: sha256_file(path) for path in (tmp_path / "mirror").iterdir()}
    assert {file["file"]: file["sha256"] for file in files} == mirror
    found = ensure_system_packages(files, folder / "system.lock", tmp_path / "store")
    assert {path.name: sha256_file(path) for path in found.iterdir()} == mirror
    asked = (tmp_path / "bin/asked").read_text().splitlines()
    assert asked[0] == f"from --platform=linux/arm64 {BASE}"
    assert asked[1].endswith("--print-uris -qq patch zlib")
    assert asked[2] == "rm working"


def test_system_package_that_changed_or_went_is_refused_and_nothing_kept(folder, tmp_path):
    lock(folder)
    files = read_system_lock(folder, BASE)
    (tmp_path / "mirror/patch_2.7_arm64.deb").write_text("other bytes")
    with pytest.raises(PostTrainingError, match="which is not locked\nhint: its mirror has moved"):
        ensure_system_packages(files, folder / "system.lock", tmp_path / "store")
    (tmp_path / "mirror/patch_2.7_arm64.deb").unlink()
    with pytest.raises(PostTrainingError, match="cannot be downloaded"):
        ensure_system_packages(files, folder / "system.lock", tmp_path / "store")
    assert list((tmp_path / "store/system").iterdir()) == []


def test_system_lock_unresolved_or_of_another_base_is_refused(folder):
    with pytest.raises(UsageError, match="no such lock"):
        read_system_lock(folder, BASE)
    leave_unresolved(folder, "no registry")
    with pytest.raises(UsageError, match="unresolved: no registry"):
        read_system_lock(folder, BASE)
    lock(folder)
    leave_unresolved(folder, "no registry today")
    assert len(json.loads((folder / "system.lock").read_text())["files"]) == 2
    with pytest.raises(UsageError, match="made for base"):
        read_system_lock(folder, BASE.replace("1", "2"))
    (folder / "system.in").write_text("patch\n")
    with pytest.raises(UsageError, match="made for asked"):
        read_system_lock(folder, BASE)
