import hashlib
import mmap
import sys
import time
from pathlib import Path

import pytest

from post_training.core.hashing import fingerprint, flushed_identity, known_sha256, sha256_of_any

# A large file that was not written just now.
OLD = Path(sys.executable).resolve()
OLD_SHA256 = hashlib.sha256(OLD.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/post-training/verified"


def test_known_sha256_reads_an_old_file_once(cache):
    read = []
    for _ in range(2):
        assert known_sha256(OLD, read.append) == OLD_SHA256
    assert read == [OLD.stat().st_size]
    [entry] = cache.iterdir()
    assert entry.read_text() == OLD_SHA256


def test_known_sha256_young_file_is_read_every_time(tmp_path, cache):
    """Another write within the same tick of the file system's clock would not show."""
    read = []
    for content in (b"one", b"one", b"two"):
        (tmp_path / "file").write_bytes(content)
        known = known_sha256(tmp_path / "file", read.append)
        assert known == hashlib.sha256(content).hexdigest()
    assert read == [3, 3, 3]
    assert not cache.exists()


def test_known_sha256_file_changed_while_it_is_read_is_not_remembered(tmp_path, cache):
    (tmp_path / "file").write_bytes(b"one")
    known_sha256(tmp_path / "file", lambda size: (tmp_path / "file").write_bytes(b"other"))
    assert not cache.exists()


@pytest.mark.parametrize("damaged", [b"", b"0" * 63, b"\xff" * 64, OLD_SHA256.upper().encode()])
def test_known_sha256_damaged_entry_is_no_verdict(cache, damaged):
    known_sha256(OLD)
    [entry] = cache.iterdir()
    entry.write_bytes(damaged)
    assert known_sha256(OLD) == OLD_SHA256
    assert entry.read_text() == OLD_SHA256


def test_flushed_identity_shows_a_second_write_through_a_map(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with open(tmp_path / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 1
        before = flushed_identity(file)
        give_up = time.monotonic() + 2  # Long before anybody else flushes the page.
        while flushed_identity(file) == before and time.monotonic() < give_up:
            mapped[0] ^= 1
        assert flushed_identity(file) != before


def test_fingerprint_with_known_digests_is_the_same_and_small_files_are_not_cached(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/small").write_bytes(b"x")
    (tmp_path / "folder/large").symlink_to(OLD)
    for path in (tmp_path / "folder", tmp_path / "folder/small", tmp_path / "folder/large"):
        assert fingerprint(path, sha256_of_any) == fingerprint(path)
    [entry] = cache.iterdir()
    assert entry.read_text() == OLD_SHA256


def test_sha256_of_any_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_of_any(tmp_path / "none")
