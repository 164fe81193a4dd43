"""`runs list` answers from its index what the folders say, whatever became of either."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from post_training.core.files import write_json
from post_training.records.run_record import identity_of
from post_training.slurm.run_index import Filters, list_states

RECORD = Path(__file__).parents[1] / "records/record_of_the_first_version.json"
DIGEST = "sha256:" + 64 * "a"


def write_run(run_dir, status="finished", stage="sft", started="2026-03-01T10:00:00", **settings):
    run_dir.mkdir(parents=True, exist_ok=True)
    attempt = {"status": status, "reason": None, "started": started, "ended": None}
    record = {
        **json.loads(RECORD.read_text()),
        "run_id": f"{stage}-{run_dir.name}",
        "status": status,
        "stage": stage,
        "recipe": settings,
        "image": {"oci_digest": DIGEST, "sqsh_sha256": 64 * "b"},
        "attempts": [{**attempt, "scheduler_job": None}],
        "outputs": None,
    }
    record["identity"] = identity_of(record)
    write_json(run_dir / "run.json", record)


@pytest.fixture
def listed(slurm_command):
    """The names of the runs that `runs list OPTIONS` shows."""

    def run(*options: str) -> list[str]:
        done = slurm_command("runs", "list", "--json", *options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [state["run_dir"].removeprefix("runs/") for state in json.loads(done.stdout)]

    return run


def test_runs_list_filters_choose_by_what_the_record_says(listed, tmp_path):
    write_run(tmp_path / "runs/a", seed=1, **{"training.learning_rate": 1e-3, "data.packing": True})
    write_run(tmp_path / "runs/b", "failed", started="2026-03-02T00:00:00", seed="1")
    write_run(tmp_path / "runs/deep/c", stage="dpo", seed=None)
    assert listed() == ["a", "b", "deep/c"]
    assert listed("--stage", "dpo") == ["deep/c"]
    assert listed("--state", "failed") == ["b"]
    assert listed("--since", "2026-03-02") == ["b"]
    assert listed("--where", "seed=1") == ["a"]
    assert listed("--where", 'seed="1"') == ["b"]
    assert listed("--where", "seed=null") == ["deep/c"]
    assert listed("--where", "training.learning_rate=0.001", "--where", "data.packing=true") == [
        "a"
    ]
    assert listed("--image", "sha256:aaaa") == listed("--image", "bbbb") == ["a", "b", "deep/c"]
    assert listed("--image", "ab") == []


def test_runs_list_unknown_state_or_stage_is_refused(slurm_command, tmp_path):
    write_run(tmp_path / "runs/a")
    done = slurm_command("runs", "list", "--state", "finnished")
    assert done.returncode == 2
    assert "--state: no run can be 'finnished'" in done.stderr
    done = slurm_command("runs", "list", "--stage", "stf")
    assert done.returncode == 2
    assert "no stage 'stf'" in done.stderr


def test_runs_list_setting_that_no_run_has_is_told_with_the_nearest(slurm_command, tmp_path):
    write_run(tmp_path / "runs/a", seed=1, **{"training.max_steps": 5})
    write_run(tmp_path / "runs/b", stage="mix", seed=2)
    write_run(tmp_path / "others/c", nokey=1)

    def told(*words: str) -> list[str]:
        done = slurm_command("runs", "list", "--json", *words)
        assert (done.returncode, done.stdout) == (0, "[]\n")
        return done.stderr.splitlines()

    slurm_command("runs", "list", "others")  # Known, and not asked about.
    no_run = "warning: no run has the setting"
    assert told("--where", "nokey=1") == [f"{no_run} 'nokey' in its recipe"]
    assert told("--where", "seed=1", "--where", "training.max_step=5") == [
        f"{no_run} 'training.max_step' in its recipe, did you mean 'training.max_steps'?"
    ]
    assert told("--where", "seed=3") == []
    assert told("--where", "training.max_steps=5", "--stage", "mix") == []
    (tmp_path / "empty").mkdir()
    assert told("empty", "--where", "nokey=1") == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "\0\0",
        "[]",
        '{"schema": "post-training/run-record/9"}',
        '{"schema": "post-training/run-record/1"}',
        '{"schema": "post-training/run-record/1", "status": "failed", "reason": null, '
        '"stage": "sft", "recipe": {}, "attempts": [{}]}',
    ],
)
def test_runs_list_damaged_record_is_told_and_hides_no_other(slurm_command, tmp_path, content):
    for name in "abc":
        write_run(tmp_path / "runs" / name)
    assert slurm_command("runs", "list").stdout.count("finished") == 3
    (tmp_path / "runs/b/run.json").write_text(content)
    done = slurm_command("runs", "list", "--json")
    assert done.returncode == 0
    assert [state["run_dir"] for state in json.loads(done.stdout)] == ["runs/a", "runs/c"]
    [warning] = done.stderr.splitlines()
    assert warning.startswith(f"warning: left out: {tmp_path}/runs/b/run.json: ")
    assert slurm_command("runs", "show", "sft-c", "--json").returncode == 0


def test_runs_list_run_whose_lock_cannot_be_asked_is_unknown_and_hides_no_other(
    tmp_path, monkeypatch
):
    """As on a file system without locks."""
    for name in "ab":
        write_run(tmp_path / "runs" / name, "running")
    write_run(tmp_path / "runs/c", "failed")
    for name in "abc":
        (tmp_path / "runs" / name / ".lock").touch()
    ask, without = fcntl.fcntl, [os.stat(tmp_path / f"runs/{name}/.lock").st_ino for name in "bc"]

    def fcntl_of(file, *words):
        if os.stat(file.fileno()).st_ino in without:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return ask(file, *words)

    monkeypatch.setattr(fcntl, "fcntl", fcntl_of)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    states = list_states(tmp_path / "runs", Filters())
    assert [state.state for state in states] == ["killed", "unknown", "failed"]
    assert f"{tmp_path}/runs/b/.lock: files can't be locked on this file system" in states[1].reason
    assert [state.run_dir.name for state in list_states(tmp_path / "runs", Filters(state="unknown"))
            ] == ["b"]  # fmt: skip


@pytest.mark.parametrize("name", [".lock", "run.json"])
def test_runs_list_file_that_cannot_be_read_hides_no_other(slurm_command, tmp_path, name):
    for run in "ab":
        write_run(tmp_path / "runs" / run, "running")
    (tmp_path / "runs/b" / name).unlink(missing_ok=True)
    (tmp_path / "runs/b" / name).mkdir()  # Root may read anything else.
    done = slurm_command("runs", "list", "--json")
    assert done.returncode == 0, done.stderr
    states = {Path(state["run_dir"]).name: state["state"] for state in json.loads(done.stdout)}
    assert states == {"a": "killed", **({"b": "unknown"} if name == ".lock" else {})}
    if name == "run.json":
        assert done.stderr.startswith("warning: left out: [Errno 21] Is a directory")


def test_runs_list_after_changes_says_what_the_folders_say_now(listed, tmp_path):
    for name in "abc":
        write_run(tmp_path / "runs" / name)
    assert listed("--state", "finished") == ["a", "b", "c"]
    write_run(tmp_path / "runs/a", "failed")
    shutil.rmtree(tmp_path / "runs/b")
    shutil.move(tmp_path / "runs/c", tmp_path / "runs/d")
    assert listed("--state", "finished") == ["d"]
    assert listed() == ["a", "d"]
    (tmp_path / "other").mkdir()
    assert listed("other") == []


@pytest.mark.parametrize("content", [None, b""])
def test_runs_list_index_that_is_gone_or_empty_is_made_again(listed, tmp_path, content):
    write_run(tmp_path / "runs/a")
    assert listed() == ["a"]
    index = tmp_path / "cache/post-training/runs.sqlite"
    index.unlink()
    if content is not None:
        index.write_bytes(content)
    assert listed() == listed() == ["a"]
    assert index.stat().st_size


@pytest.mark.parametrize("damage", ["header", "pages", "columns", "values"])
def test_runs_list_index_that_is_damaged_is_made_again_with_a_word(
    listed, slurm_command, tmp_path, damage
):
    write_run(tmp_path / "runs/a")
    assert listed() == ["a"]
    path = tmp_path / "cache/post-training/runs.sqlite"
    if damage == "header":
        path.write_bytes(b"no database at all" * 100)
    elif damage == "pages":
        data = bytearray(path.read_bytes())
        data[200:] = b"\xff" * len(data[200:])
        path.write_bytes(data)
    else:
        change = {
            "columns": "ALTER TABLE runs RENAME COLUMN told TO said",
            "values": "UPDATE runs SET told = '{'",
        }[damage]
        with contextlib.closing(sqlite3.connect(path)) as index, index:
            index.execute(change)
    done = slurm_command("runs", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"warning: damaged, and made again: {path}: ")
    assert [state["run_dir"] for state in json.loads(done.stdout)] == ["runs/a"]
    assert listed() == ["a"]


def test_runs_list_record_that_was_changed_by_hand_is_told(slurm_command, tmp_path):
    write_run(tmp_path / "runs/a")
    path = tmp_path / "runs/a/run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seal": "of something else"}))
    assert "was changed by hand" in slurm_command("runs", "list").stdout


def test_runs_list_cache_folder_that_cannot_be_is_told_and_left(slurm_command, tmp_path):
    write_run(tmp_path / "runs/a")
    (tmp_path / "cache").write_text("a file")
    done = slurm_command("runs", "list")
    assert done.returncode == 0
    assert "runs/a" in done.stdout
    assert done.stderr.startswith("warning: no index is kept in ")


def test_runs_list_cache_folder_that_the_file_system_refuses_is_told_and_left(
    tmp_path, monkeypatch, capsys
):
    """As a full disk does, or one mounted read-only: for another reason than permissions."""
    write_run(tmp_path / "runs/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    [state] = list_states(tmp_path / "runs", Filters())
    assert state.state == "finished"
    assert capsys.readouterr().err.startswith("warning: no index is kept in /proc/none/")


def test_runs_show_by_id_finds_the_folder_also_from_elsewhere(slurm_command, tmp_path):
    write_run(tmp_path / "runs/a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shown = slurm_command("runs", "show", "sft-a", "--json")
    assert json.loads(shown.stdout)["run_id"] == "sft-a"
    assert slurm_command("runs", "show", "sft-a", "--json", cwd=elsewhere).stdout == shown.stdout
    shutil.move(tmp_path / "runs/a", tmp_path / "gone")
    done = slurm_command("runs", "show", "sft-a", cwd=elsewhere)
    assert done.returncode == 2
    assert "sft-a: no such folder, and no run of that id is known here" in done.stderr
