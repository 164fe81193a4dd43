import hashlib
import os
import shutil
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.images.identity import (
    check_image_digest,
    check_unchanged,
    image_digest,
    image_state,
    open_image,
    open_image_digest,
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.sqsh"
    path.write_bytes(b"content")
    return path


def test_image_digest_is_read_once_and_then_cached():
    old = Path(shutil.which("sh"))  # Any file that was not written just now.
    digest = hashlib.sha256(old.read_bytes()).hexdigest()
    assert image_digest(old) == (digest, "hashed")
    assert image_digest(old) == (digest, "cached")


def test_check_image_digest_remembered_one_is_compared_too():
    old = Path(shutil.which("sh"))
    for _ in range(2):
        with pytest.raises(PostTrainingError, match="sha256 is"):
            check_image_digest(old, "0" * 64)
    assert image_digest(old).check == "cached"


def test_open_image_digest_is_of_the_open_file_whatever_took_its_place(image):
    descriptor = open_image(image)
    (image.parent / "other").write_bytes(b"another")
    os.replace(image.parent / "other", image)
    assert open_image_digest(descriptor, image).sha256 == hashlib.sha256(b"content").hexdigest()
    os.close(descriptor)


def test_check_unchanged_file_written_to_is_refused_and_a_new_link_is_not(image):
    descriptor = open_image(image)
    before = image_state(descriptor)
    os.link(image, image.parent / "link")
    check_unchanged(descriptor, before, image)
    image.write_bytes(b"longer content")
    with pytest.raises(PostTrainingError, match="was changed while it was verified"):
        check_unchanged(descriptor, before, image)
    os.close(descriptor)


def test_open_image_what_is_no_file_is_refused_at_once_and_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("pipe", "this is a pipe"), ("zero", "this is a device"), (".", "this is a folder"),
        ("loop", "too many levels of symbolic links"),
    ):  # fmt: skip
        with pytest.raises(PostTrainingError, match=message) as raised:
            image_digest(tmp_path / name)
        assert raised.value.where == str(tmp_path / name)


def test_image_digest_changed_file_is_read_again_whatever_its_mtime(image):
    before = image.stat()
    image_digest(image)
    image.write_bytes(b"c0ntent")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image_digest(image) == (hashlib.sha256(b"c0ntent").hexdigest(), "hashed")


def test_image_digest_without_a_cache_is_still_right(image, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such")
    assert [image_digest(image).check for _ in range(2)] == ["hashed", "hashed"]


def test_check_image_digest_mismatch_names_both(image):
    with pytest.raises(PostTrainingError, match=f"the EDF pins {'0' * 64}"):
        check_image_digest(image, "0" * 64)


def test_image_digest_missing_file_has_a_hint(tmp_path):
    with pytest.raises(PostTrainingError, match=r"no such image\nhint: "):
        image_digest(tmp_path / "none.sqsh")
