import hashlib
import os

import pytest

from post_training.core.errors import PostTrainingError
from post_training.images.verify import check_image_digest, image_digest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.sqsh"
    path.write_bytes(b"content")
    return path


def test_image_digest_is_read_once_and_then_cached(image):
    digest = hashlib.sha256(b"content").hexdigest()
    assert image_digest(image) == (digest, "hashed")
    assert image_digest(image) == (digest, "cached")


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
