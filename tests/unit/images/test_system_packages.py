"""Files of a base's distribution: named by the base's own apt, fetched by hash.

The builder is a stand-in, whose base is this machine's apt with the index of apt_repository/: two
packages, signed by a key that was thrown away (gpg --clearsign).
"""

import json
import shutil
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import sha256_file
from post_training.images.registry import (
    ensure_system_packages,
    leave_unresolved,
    lock_system_packages,
    parse_printed_files,
    read_system_lock,
)

BASE = "registry.example/cuda@sha256:" + "1" * 64
BUILDAH = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/asked"
case $1 in
from) echo working ;;
run) for script; do :; done; APT_CONFIG=$here/apt.conf exec sh -c "$script" ;;
esac
"""
APT = """
APT::Architecture "amd64"; APT::Architectures "amd64"; APT::Sandbox::User "root";
Dir::Etc "{0}/etc"; Dir::State "{0}/state"; Dir::State::status "/dev/null"; Dir::Cache "{0}/cache";
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A recipe's folder, whose base has a mirror with `patch` and the zlib that it needs."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in ("bin", "mirror/pool", "gh200", "working", "etc/apt.conf.d", "state/lists/partial"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin/buildah").write_text(BUILDAH)
    (tmp_path / "bin/buildah").chmod(0o755)
    (tmp_path / "bin/apt.conf").write_text(APT.format(tmp_path))
    signed = Path(__file__).with_name("apt_repository")
    for name in ("InRelease", "Packages"):
        shutil.copy(signed / name, tmp_path / "mirror")
    source = f"deb [signed-by={signed}/key.asc] file:{tmp_path}/mirror ./\n"
    (tmp_path / "etc/sources.list").write_text(source)
    for name in ("zlib_1.3+b1_amd64.deb", "patch_2.7_amd64.deb"):
        (tmp_path / "mirror/pool" / name).write_text(name)
    (tmp_path / "gh200/system.in").write_text("# comment\npatch\n")
    return tmp_path / "gh200"


def lock(folder: Path) -> None:
    lock_system_packages(folder, BASE, "linux/arm64", folder.parent / "working")


def test_system_lock_names_files_by_sha256_and_the_build_fetches_them(folder, tmp_path):
    lock(folder)
    files = read_system_lock(folder, BASE)
    pool = {path.name: sha256_file(path) for path in (tmp_path / "mirror/pool").iterdir()}
    expected = {
        "patch_2.7_amd64.deb": pool["patch_2.7_amd64.deb"],
        "zlib_1:1.3+b1_amd64.deb": pool["zlib_1.3+b1_amd64.deb"],
    }
    assert {file["file"]: file["sha256"] for file in files} == expected
    found = ensure_system_packages(files, folder / "system.lock", tmp_path / "store")
    assert {path.name: sha256_file(path) for path in found.iterdir()} == expected
    asked = (tmp_path / "bin/asked").read_text().splitlines()
    assert asked[0] == f"from --platform=linux/arm64 {BASE}"
    assert asked[2] == "rm working"


def test_system_package_with_other_bytes_than_the_signed_index_says_is_not_locked(folder, tmp_path):
    (tmp_path / "mirror/pool/patch_2.7_amd64.deb").write_text("other bytes")
    with pytest.raises(PostTrainingError, match="which is not locked"):
        lock(folder)
    assert not (folder / "system.lock").exists()


def test_system_packages_of_an_index_that_is_not_the_signed_one_are_not_locked(folder, tmp_path):
    index = tmp_path / "mirror/Packages"
    index.write_text(index.read_text().replace("2.7", "2.8"))
    with pytest.raises(PostTrainingError, match="Hash Sum mismatch"):
        lock(folder)
    signed = (tmp_path / "mirror/InRelease").rename(tmp_path / "mirror/Release")
    signed.write_text(signed.read_text().split("\n\n")[1] + "\n")
    with pytest.raises(PostTrainingError, match="is not signed"):
        lock(folder)
    # What the base's own settings allow does not count.
    (tmp_path / "etc/apt.conf.d/insecure").write_text('Acquire::AllowInsecureRepositories "true";')
    with pytest.raises(PostTrainingError, match="is not signed"):
        lock(folder)
    assert not (folder / "system.lock").exists()


@pytest.mark.parametrize("said", ["MD5Sum:" + "0" * 32, "SHA256:12", ""])
def test_system_package_without_a_sha256_in_the_index_is_refused(said):
    with pytest.raises(PostTrainingError, match=r"patch\.deb: apt's index has no sha256 of it"):
        parse_printed_files(f"'http://mirror.example/patch.deb' patch.deb 12 {said}\n")


def test_system_package_that_changed_or_went_is_refused_and_nothing_kept(folder, tmp_path):
    lock(folder)
    files = read_system_lock(folder, BASE)
    (tmp_path / "mirror/pool/patch_2.7_amd64.deb").write_text("other bytes")
    with pytest.raises(PostTrainingError, match="which is not locked\nhint: its mirror has moved"):
        ensure_system_packages(files, folder / "system.lock", tmp_path / "store")
    (tmp_path / "mirror/pool/patch_2.7_amd64.deb").unlink()
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
    (folder / "system.in").write_text("zlib\n")
    with pytest.raises(UsageError, match="made for asked"):
        read_system_lock(folder, BASE)
