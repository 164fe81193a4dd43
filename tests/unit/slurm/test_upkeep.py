"""storage repair, touch and clean: what is changed, what is left, and whose it is."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from post_training.cli.machines import storage_clean
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import write_atomic
from post_training.core.locks import locked
from post_training.records.run_record import RECORD_NAME
from post_training.slurm.upkeep import Touched, _is_ours, find_removable, remove, repair, touch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a private umask leaves it, with a program and a link out of it."""
    folder = tmp_path / "shared"
    (folder / "run/deep").mkdir(parents=True)
    (folder / "run/deep/weights").write_bytes(b"12")
    (folder / "run/job.sh").write_text("")
    (tmp_path / "outside").write_text("")
    (folder / "run/link").symlink_to(tmp_path / "outside")
    for path in (folder, *folder.rglob("*"), tmp_path / "outside"):
        if not path.is_symlink():
            is_program = path.is_dir() or path.suffix == ".sh"
            path.chmod(0o700 if is_program else 0o600)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_repair_opens_all_to_the_group_and_what_is_made_there_later(folder, tmp_path):
    assert repair(folder, None, None).num_paths == 5
    assert mode(folder / "run/deep") == 0o2770
    assert mode(folder / "run/deep/weights") == 0o660
    assert mode(folder / "run/job.sh") == 0o770
    assert mode(tmp_path / "outside") == 0o600
    earlier = os.umask(0o077)
    try:
        write_atomic(folder / "run/deep/later", "x")
    finally:
        os.umask(earlier)
    assert mode(folder / "run/deep/later") & 0o070 == 0o060


def test_repair_of_a_path_that_becomes_a_link_leaves_what_it_leads_to(
    folder, tmp_path, monkeypatch
):
    """Somebody of the group puts a link in the place of a file once that was looked at."""
    secret = tmp_path / "outside"
    file = folder / "run/deep/weights"
    same = file.stat().st_ino
    look = os.fstat

    def exchange(descriptor: int) -> os.stat_result:
        status = look(descriptor)
        if status.st_ino == same and not file.is_symlink():
            file.unlink()
            file.symlink_to(secret)
        return status

    monkeypatch.setattr(os, "fstat", exchange)
    repair(folder, None, None)
    assert file.is_symlink()
    assert mode(secret) == 0o600


def test_repair_lets_a_second_group_read_and_not_write(folder):
    repair(folder, "root", "daemon")
    acl = subprocess.run(
        ["getfacl", "--omit-header", "--absolute-names", folder / "run/deep/weights", folder],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "group:daemon:r--" in acl
    assert "default:group:daemon:r-x" in acl
    (folder / "later").write_text("")
    acl = subprocess.run(
        ["getfacl", "--omit-header", folder.name + "/later"],
        cwd=folder.parent, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "group:daemon:r-x\t#effective:r" in acl or "group:daemon:r--" in acl


def test_repair_for_an_unknown_group_names_it(folder):
    with pytest.raises(UsageError, match="--group: no such group: no-such-group"):
        repair(folder, "no-such-group", None)
    with pytest.raises(PostTrainingError):
        repair(folder, None, "no-such-group")


def test_repair_without_setfacl_refuses_readers_and_warns_otherwise(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UsageError, match="a second group needs ACLs"):
        repair(folder, None, "daemon")
    repair(folder, None, None)
    assert "setfacl is not installed" in capsys.readouterr().err
    assert mode(folder / "run/deep/weights") == 0o660


def test_files_of_another_owner_are_counted_and_left(folder, monkeypatch):
    done = Touched()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not _is_ours((folder / "run").stat(), done)
    assert done.of_others == {(folder / "run").owner(): 1}


def test_touch_sets_the_time_of_use_and_leaves_that_of_writing(folder):
    weights = folder / "run/deep/weights"
    os.utime(weights, (1000, 2000))
    assert touch(folder).num_paths == 2
    status = weights.stat()
    assert status.st_mtime == 2000
    assert status.st_atime > 1_700_000_000


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("live", "ended"):
        run = tmp_path / "runs" / name
        for part in ("cache/huggingface", "checkpoints/.saving", "model"):
            (run / part).mkdir(parents=True)
            (run / part / "file").write_bytes(b"123")
        (run / RECORD_NAME).write_text("{}")
        (run / ".metrics.jsonl.0a1b2c3d.tmp").write_text("12")
        (run / ".hidden.tmp").write_text("of the user's own")
    return tmp_path / "runs"


def test_clean_finds_caches_and_half_written_files_of_runs_that_are_not_live(runs):
    with locked(runs / "live/.lock"):
        found = find_removable(runs, 0)
    assert {str(each.path.relative_to(runs)): each.size_bytes for each in found} == {
        "ended/cache": 3,
        "ended/checkpoints/.saving": 3,
        "ended/.metrics.jsonl.0a1b2c3d.tmp": 2,
    }
    remove(found)
    assert not (runs / "ended/cache").exists()
    assert (runs / "ended/model/file").exists()
    assert (runs / "ended/.hidden.tmp").exists()
    assert (runs / "live/cache").exists()


def test_clean_as_json_lists_the_same_and_removes_it_only_when_told(runs, capsys):
    for yes, is_there in ((False, True), (True, False)):
        storage_clean(runs / "ended", hours=0, yes=yes, as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert {each["path"]: (each["kind"], each["size_bytes"]) for each in found} == {
            str(runs / "ended/cache"): ("cache of a run", 3),
            str(runs / "ended/checkpoints/.saving"): ("half-written checkpoint", 3),
            str(runs / "ended/.metrics.jsonl.0a1b2c3d.tmp"): ("half-written", 2),
        }
        assert (runs / "ended/cache").exists() is is_there


def test_clean_leaves_what_was_written_lately(runs):
    assert find_removable(runs, 1) == []


def test_upkeep_of_no_folder_says_so(tmp_path):
    for act in (touch, lambda path: repair(path, None, None), lambda path: find_removable(path, 1)):
        with pytest.raises(UsageError, match="no such folder"):
            act(tmp_path / "nowhere")
