"""The image again from nothing, and its release."""

import json
import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.long, pytest.mark.image]


def test_image_rebuilt_from_nothing_is_identical(committed_image, post_training):
    store, record, checkout = committed_image
    done = post_training("image", "rebuild", "cpu", "--store", store.folder,
                         "--repository", checkout)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"identical: {record['oci_digest']}")


def test_image_of_another_commit_differs_in_the_paths_that_changed(committed_image, post_training):
    store, record, checkout = committed_image
    (checkout / "src/post_training/added.py").write_text("")
    git = ["git", "-C", checkout, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "more"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True).stdout
    with store.lock():
        store.add({**record, "checkout": {"commit": commit.decode().strip(), "dirty": False}})
    done = post_training("image", "rebuild", "cpu", "--cached", "--store", store.folder,
                         "--repository", checkout)  # fmt: skip
    assert done.returncode == 4, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[1].startswith(f"input_hash is {record['input_hash']}, then ")
    assert "etc/post-training/image.json: content" in lines
    package = "opt/post-training/venv/lib/python3.11/site-packages/post_training"
    assert f"{package}/added.py: only in the second" in lines


def test_reproduce_of_a_run_whose_image_is_gone_builds_the_image_again(
    committed_image, job, post_training, tmp_path, forge
):
    store, record, checkout = committed_image
    with store.lock():
        store.remove(record)
    shutil.copytree(job / "run", tmp_path / "run")
    forge(tmp_path / "run", lambda run: run["image"].update(checkout=record["checkout"]))
    words = ["reproduce", tmp_path / "run", "--store", store.folder, "--repository", checkout]
    done = post_training(*words, "--dry-run")
    assert (done.returncode, done.stdout) == (0, "ready to run again\n")
    commit = record["checkout"]["commit"][:12]
    assert f"is in no store; it is built again from commit {commit}" in done.stderr
    done = post_training(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: ")
    assert [image["sqsh_sha256"] for image in store.index()] == [record["sqsh_sha256"]]


def test_release_tests_the_image_and_writes_the_lock(committed_image, post_training):
    store, record, checkout = committed_image
    test = "tests/stack/stages/test_init_model.py"
    done = post_training("image", "release", "cpu", test, "--store", store.folder,
                         "--repository", checkout)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [entry] = json.loads((checkout / "containers/images.lock").read_text())["images"]
    for key in ("oci_digest", "sqsh_sha256", "input_hash", "base_sha256"):
        assert entry[key] == record[key]
    assert entry["commit"] == record["checkout"]["commit"]
    assert entry["tested"].startswith(f"selfcheck; pytest {test}: ")


def test_release_of_an_image_whose_tests_fail_writes_nothing(committed_image, post_training):
    store, _, checkout = committed_image
    done = post_training("image", "release", "cpu", "tests/stack/test_none.py", "--store",
                         store.folder, "--repository", checkout)  # fmt: skip
    assert done.returncode == 1
    assert "its tests failed in the image; it is not released" in done.stderr
    assert not (checkout / "containers/images.lock").exists()
