import hashlib
import os
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.core.hashing import fingerprint, fingerprint_files, hash_files, sha256_value


def test_fingerprint_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    assert fingerprint(tmp_path / "x") == hashlib.sha256(b"content").hexdigest()


def test_fingerprint_of_a_folder_counts_names_and_contents_only(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/a").write_text("A")
        (tmp_path / name / ".b").write_text("B")
    expected = fingerprint(tmp_path / "one")
    os.utime(tmp_path / "two/sub/a", (0, 0))
    (tmp_path / "two/sub/a").chmod(0o600)
    (tmp_path / "two/artifact.json").write_text("{}")
    assert fingerprint(tmp_path / "two") == expected
    (tmp_path / "two/.b").rename(tmp_path / "two/.c")
    assert fingerprint(tmp_path / "two") != expected


def test_hash_files_lists_relative_paths_in_order(tmp_path):
    (tmp_path / "z").mkdir()
    for name in ("z/artifact.json", "b", "a b", "artifact.json"):
        (tmp_path / name).write_text(name)
    assert list(hash_files(tmp_path)) == ["a b", "b", "z/artifact.json"]


def test_fingerprint_files_does_not_mix_names_and_hashes():
    assert fingerprint_files({"a": "bc"}) != fingerprint_files({"ab": "c"})


def test_sha256_value_ignores_key_order_and_not_types():
    assert sha256_value({"a": 1, "b": 2}) == sha256_value({"b": 2, "a": 1})
    assert sha256_value({"a": 1}) != sha256_value({"a": "1"})


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_fingerprint_of_what_has_no_end_is_refused_at_once(kind: str, tmp_path):
    path = tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"must be a file or a folder \(is a (pipe|device)"):
        fingerprint(path)


def test_fingerprint_of_a_folder_has_what_its_links_to_folders_elsewhere_lead_to(tmp_path):
    (tmp_path / "given/own").mkdir(parents=True)
    (tmp_path / "given/own/a").write_text("A")
    before = fingerprint(tmp_path / "given")
    (tmp_path / "given/own/within").symlink_to("../own")
    assert fingerprint(tmp_path / "given") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/b").write_text("B")
    (tmp_path / "other/back").symlink_to(tmp_path / "given")
    (tmp_path / "given/other").symlink_to("../other")
    assert list(hash_files(tmp_path / "given")) == ["other/b", "own/a"]
    assert fingerprint(tmp_path / "given") != before
