import os
import stat
import subprocess
from pathlib import Path

import pytest

from post_training.core.files import (
    atomic_directory,
    atomic_file,
    copy_folder,
    parse_mount_table,
    write_atomic,
    write_json,
)
from post_training.core.locks import hold


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "sub folder/file"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
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


def write_all(folder: Path) -> None:
    """By each of our writers; `private` is what a library wrote beside its place."""
    write_json(folder / "file", {})
    with atomic_file(folder / "replaced") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    with atomic_directory(folder / "made") as made:
        (made / "nested").mkdir()
        os.close(os.open(made / "nested/private", os.O_CREAT | os.O_WRONLY, 0o600))
        write_atomic(made / "nested/file", "x")
    with atomic_directory(folder / "copied") as copied:
        copy_folder(folder / "made", copied)
    hold(folder / "lock").close()


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002, 0o000])
def test_writers_keep_the_umask(umask, tmp_path):
    earlier = os.umask(umask)
    try:
        write_all(tmp_path / "all")
    finally:
        os.umask(earlier)
    written = [tmp_path / "all", *(tmp_path / "all").rglob("*")]
    assert len(written) == 12
    for path in written:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_writers_keep_the_group_of_the_folder(tmp_path):
    tmp_path.chmod(0o2777)
    write_all(tmp_path / "all")
    for folder in (tmp_path / "all", tmp_path / "all/made", tmp_path / "all/copied/nested"):
        assert folder.stat().st_mode & stat.S_ISGID, folder


def test_atomic_directory_is_synced_whole(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    name = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(name(fd))), sync(fd)))
    with atomic_directory(tmp_path / "folder") as made:
        (made / "a/b").mkdir(parents=True)
        (made / "a/b/file").touch()
    expected = [made / "a/b/file", made / "a/b", made / "a", made, tmp_path]
    assert set(synced) == set(map(str, expected))
    assert synced[-1] == str(tmp_path)


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


def test_parse_mount_table_gives_places_as_they_are_written_and_their_file_systems():
    table = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:3 / /Übung\\040zwei rw - lustre host:/x rw,flock\n"
    )
    assert parse_mount_table(table) == [("/", "ext4"), ("/Übung zwei", "lustre")]
