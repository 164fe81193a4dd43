"""`post-training image rebuild` and `release`; tests/long/test_rebuild.py has them in full."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_file
from post_training.images.push import make_squashfs
from post_training.images.rebuild import image_differences
from post_training.images.release import add_release, release_entry
from post_training.images.store import RECORD_SCHEMA, ImageStore

COMMIT = "c" * 40


@pytest.mark.image
def test_rebuild_of_the_image_from_its_commit_is_identical(committed_image, post_training):
    """Another folder, umask and time, a store of its own; the layers come from buildah's cache."""
    store, record, checkout = committed_image
    digest = record["sqsh_sha256"]
    with store.lock():  # A change that is not the image's is no obstacle.
        store.add({**record, "checkout": {**record["checkout"], "dirty": True}})
    old_umask = os.umask(0o077)
    done = post_training(
        "image", "rebuild", digest, "--cached", "--store", store.folder, "--repository", checkout
    )
    os.umask(old_umask)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"identical: {record['oci_digest']}, squashfs {digest}\n"
    assert not list(store.folder.glob(".work-*"))
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout
    assert len(listed.splitlines()) == 1


@pytest.mark.image
def test_rebuild_of_changes_that_nobody_kept_is_refused(committed_image, post_training):
    store, record, checkout = committed_image
    with store.lock():
        store.add(
            {**record, "input_hash": "0" * 64, "checkout": record["checkout"] | {"dirty": True}}
        )
    done = post_training(
        "image", "rebuild", "cpu", "--store", store.folder, "--repository", checkout
    )
    assert done.returncode == 2
    assert "which nobody kept" in done.stderr


def add_image(folder: Path, files: dict[str, str], **changes) -> tuple[ImageStore, dict]:
    """A store with one image that holds `files`, and its record with `changes`."""
    store = ImageStore(folder / "store")
    for name, text in files.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text(text)
    make_squashfs(folder / "tree", folder / "image.sqsh")
    digest = sha256_file(folder / "image.sqsh")
    record = {
        "schema": RECORD_SCHEMA,
        "name": "cpu",
        "version": "1",
        "platform": "linux/amd64",
        "input_hash": "1" * 64,
        "base": "locked",
        "base_sha256": "2" * 64,
        "lock_sha256": {},
        "oci_digest": "sha256:" + "3" * 64,
        "sqsh_sha256": digest,
        "size_bytes": 4096,
        "pushed": "2026-01-01T00:00:00+00:00",
        "checkout": {"commit": COMMIT, "dirty": False},
        "builder": {"mksquashfs": "mksquashfs version 4.5.1"},
        **changes,
    }
    with store.lock():
        (folder / "image.sqsh").rename(store.image_path(digest))
        store.add(record)
    return store, record


def test_image_differences_of_equal_images_are_none(tmp_path):
    store, record = add_image(tmp_path / "first", {"a": "1"})
    again, other = add_image(tmp_path / "second", {"a": "1"})
    assert image_differences(record, store, other, again) == []


def test_image_differences_name_digests_tools_and_first_paths(tmp_path):
    same = {f"folder/{number:02}": "1" for number in range(20)}
    store, record = add_image(tmp_path / "first", same)
    again, other = add_image(
        tmp_path / "second",
        {**same, **{f"folder/{number:02}": "2" for number in range(5, 18)}},
        builder={"mksquashfs": "mksquashfs version 4.6"},
    )
    lines = image_differences(record, store, other, again)
    assert lines[0] == f"sqsh_sha256 is {record['sqsh_sha256']}, then {other['sqsh_sha256']}"
    assert lines[1] == "mksquashfs is mksquashfs version 4.5.1, then mksquashfs version 4.6"
    assert lines[2:] == [*(f"folder/{number:02}: content" for number in range(5, 15)), "…"]


@pytest.mark.parametrize("key", ["base_sha256", "input_hash", "oci_digest", "sif_sha256"])
def test_image_differences_of_equal_squashfs_name_another_digest(tmp_path, key):
    """The same files, with other settings of the image, or packed otherwise for Singularity."""
    store, record = add_image(tmp_path / "first", {"a": "1"}, sif_sha256="4" * 64)
    again, other = add_image(tmp_path / "second", {"a": "1"}, sif_sha256="4" * 64)
    assert image_differences(record, store, {**other, key: "5" * 64}, again) == [
        f"{key} is {record[key]}, then {'5' * 64}",
        "every path is equal",
    ]


def test_image_differences_without_the_first_image_say_so(tmp_path):
    store, record = add_image(tmp_path / "first", {"a": "1"})
    again, other = add_image(tmp_path / "second", {"a": "2"})
    store.image_path(record["sqsh_sha256"]).unlink()
    assert image_differences(record, store, other, again)[-1].endswith(
        "is gone, so no paths can be compared"
    )


@pytest.fixture
def empty_checkout(tmp_path) -> Path:
    subprocess.run(["git", "init", "-q", tmp_path / "checkout"], check=True)
    return tmp_path / "checkout"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"checkout": None}, "was not built from a git checkout"),
        ({}, f"there is no commit {COMMIT}"),
    ],
)
def test_rebuild_without_the_sources_is_refused(
    changes, problem, empty_checkout, post_training, tmp_path
):
    store, _ = add_image(tmp_path, {"a": "1"}, **changes)
    done = post_training(
        "image", "rebuild", "cpu", "--store", store.folder, "--repository", empty_checkout
    )
    assert done.returncode == 2
    assert problem in done.stderr
    assert not list(store.folder.glob(".work-*"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"checkout": None}, "it was not built from a git checkout"),
        ({"checkout": {"commit": COMMIT, "dirty": True}}, "built from a checkout with changes"),
        ({"base": "unlocked"}, "its base is not the one that base.lock names"),
        ({}, f"there is no commit {COMMIT}"),
    ],
)
def test_release_of_what_cannot_be_built_again_is_refused(
    changes, problem, empty_checkout, post_training, tmp_path
):
    store, _ = add_image(tmp_path, {"a": "1"}, **changes)
    done = post_training(
        "image", "release", "cpu", "--store", store.folder, "--repository", empty_checkout
    )
    assert done.returncode == 2
    assert problem in done.stderr
    assert not (empty_checkout / "containers").exists()


def test_release_of_a_version_that_is_another_image_is_refused(
    empty_checkout, post_training, tmp_path
):
    store, record = add_image(tmp_path, {"a": "1"})
    earlier = {**record, "oci_digest": "sha256:" + "4" * 64}
    add_release(empty_checkout, release_entry(earlier, "by hand", "2026-01-01"))
    before = (empty_checkout / "containers/images.lock").read_text()
    done = post_training(
        "image", "release", "cpu", "--store", store.folder, "--repository", empty_checkout
    )
    assert done.returncode == 2
    assert f"cpu 1 is released as sha256:{'4' * 64}" in done.stderr
    assert (empty_checkout / "containers/images.lock").read_text() == before
    [entry] = json.loads(before)["images"]
    assert entry["commit"] == COMMIT


def test_release_of_a_damaged_image_is_refused(empty_checkout, post_training, tmp_path):
    store, record = add_image(tmp_path, {"a": "1"})
    store.image_path(record["sqsh_sha256"]).write_bytes(b"hsqs")
    done = post_training(
        "image", "release", "cpu", "--store", store.folder, "--repository", empty_checkout
    )
    assert done.returncode == 1
    assert "the image is corrupt" in done.stderr
