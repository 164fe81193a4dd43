import os
import subprocess

import pytest

from post_training.core.files import atomic_directory, atomic_file, write_atomic, write_json


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "sub folder/file"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_atomic_file_failure_keeps_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_directory_is_whole_or_absent(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "part").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with atomic_directory(path) as temporary:
        (temporary / "part").write_text("whole")
        assert not path.exists()
    assert (path / "part").read_text() == "whole"
    with pytest.raises(OSError, match="not empty"), atomic_directory(path) as temporary:
        (temporary / "part").write_text("other")
    assert (path / "part").read_text() == "whole"
    assert os.listdir(tmp_path) == ["folder"]


def test_write_json_keeps_the_order_of_keys(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": 1,\n  "a": "é"\n}\n'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_write_atomic_full_disk_keeps_the_old_content(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        write_atomic(tmp_path / "file", "old")
        with pytest.raises(OSError, match="No space left"):
            write_atomic(tmp_path / "file", b"x" * 200_000)
        assert (tmp_path / "file").read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
