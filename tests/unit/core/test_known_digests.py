import hashlib

import pytest

from post_training.core.hashing import fingerprint
from post_training.core.known_digests import known_sha256, sha256_of_any

LARGE = b"x" * (1 << 20)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/post-training/verified"


def test_known_sha256_reads_a_file_once_and_again_when_it_changed(tmp_path):
    read = []
    (tmp_path / "file").write_bytes(b"one")
    for _ in range(2):
        known = known_sha256(tmp_path / "file", read.append)
        assert known == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "file").write_bytes(b"three")
    assert known_sha256(tmp_path / "file", read.append) == hashlib.sha256(b"three").hexdigest()
    assert read == [3, 5]


def test_fingerprint_with_known_digests_is_the_same_and_small_files_are_not_cached(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    for name, content in (("small", b"x"), ("large", LARGE)):
        (tmp_path / "folder" / name).write_bytes(content)
    for path in (tmp_path / "folder", tmp_path / "folder/small", tmp_path / "folder/large"):
        assert fingerprint(path, sha256_of_any) == fingerprint(path)
    [entry] = cache.iterdir()
    assert entry.read_text() == hashlib.sha256(LARGE).hexdigest()


def test_sha256_of_any_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_of_any(tmp_path / "none")
