import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.core.hashing import sha256_text
from post_training.records.run import RunDescription, RunFolder, is_live
from post_training.records.run_record import read_record, read_whole_record, record_faults, seal

DESCRIPTION = RunDescription(
    stage="sft",
    recipe={"lr": 1e-3},
    topology={"world_size": 1},
    inputs={"data": {"path": "/data", "fingerprint": "f" * 64}},
    image={"oci_digest": "sha256:a"},
    facts={"machine": {"host": "here"}, "scheduler_job": None, "command": ["entrypoint"]},
)


def start(path: Path, description: RunDescription = DESCRIPTION, **flags) -> RunFolder:
    folder = RunFolder(path)
    folder.claim()
    folder.start(description, **flags)
    return folder


def release(folder: RunFolder) -> None:
    """What the end of a process does."""
    folder._lock.close()


def test_start_writes_a_running_record_at_once(tmp_path):
    folder = start(tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record["status"] == "running"
    assert record["run_id"].startswith("sft-")
    assert record["identity"] == DESCRIPTION.identity
    assert [attempt["status"] for attempt in record["attempts"]] == ["running"]
    release(folder)


def test_start_removes_what_a_killed_attempt_left_half_written(tmp_path):
    for name in (".run.json.17be4adb.tmp", ".config.yaml.0123abcd.tmp"):
        (tmp_path / name).write_text("{")
    release(start(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_record_changed_by_hand_is_noticed(tmp_path):
    release(start(tmp_path))
    record = read_record(tmp_path)
    assert record_faults(record) == []
    sealed, identity = "was changed by hand (its seal is", "identity is not that of its recipe"
    record["command"] = ["another"]
    assert [fault.split(" of ")[0] for fault in record_faults(record)] == [sealed]
    record["recipe"]["lr"] = 2e-3
    record["seal"] = seal(record)
    [fault] = record_faults(record)
    assert fault.startswith(identity)


@pytest.mark.parametrize("since", ["debug", "mounted_over"])
def test_record_whose_seal_is_gone_was_changed_by_hand(tmp_path, since):
    facts = {**DESCRIPTION.facts, since: False}
    release(start(tmp_path, replace(DESCRIPTION, facts=facts)))
    record = read_record(tmp_path)
    del record["seal"]
    assert record_faults(record) == ["was changed by hand (its seal is gone)"]
    del record[since]
    assert record_faults(record) == []


def test_record_holds_no_secret_and_says_what_was_taken_out(tmp_path, capsys):
    token = "ghp_" + 36 * "a"
    facts = {
        **DESCRIPTION.facts,
        "command": ["entrypoint", "sft", f"/data/{token}.yaml"],
        "code": {"from": "development mount", "diff": f"+KEY = '{token}'\n+x = 1"},
    }
    folder = start(tmp_path, replace(DESCRIPTION, facts=facts))
    folder.close("failed", f"no such folder: {token}")
    assert token not in (tmp_path / "run.json").read_text()
    record = read_record(tmp_path)
    assert record["code"]["diff"] == "+KEY = '[redacted: GitHub token]'\n+x = 1"
    assert record["redacted"] == ["command[2]: GitHub token", "code.diff: GitHub token"]
    assert "a secret is not recorded: code.diff: GitHub token" in capsys.readouterr().err
    assert record_faults(record) == []
    release(folder)


def test_record_of_a_path_with_a_secret_is_refused_before_the_folder_is_made(tmp_path):
    path = tmp_path / ("ghp_" + 36 * "a") / "run"
    with pytest.raises(UsageError, match=r"path of the run folder holds a secret .GitHub token"):
        start(path)
    assert list(tmp_path.iterdir()) == []


def test_close_writes_status_reason_outputs_and_end(tmp_path):
    folder = start(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("x")
    outputs = {"files": {"x": "1"}, "unstable_files": ["metrics.jsonl", "wandb/x", "gone"]}
    folder.close("finished", outputs=outputs, metrics={"loss": 2.0})
    record = read_record(tmp_path)
    digests = {"metrics.jsonl": sha256_text("x")}
    assert (record["status"], record["outputs"], record["metrics"]) == (
        "finished",
        {**outputs, "run_files": digests},
        {"loss": 2.0},
    )
    assert record["attempts"][0]["ended"] >= record["attempts"][0]["started"]
    # A job's script looks for this line (slurm/script.py).
    assert '  "status": "finished",' in (tmp_path / "run.json").read_text().splitlines()
    release(folder)


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_start_again_continues_an_unfinished_run(tmp_path, status):
    folder = start(tmp_path)
    if status != "running":
        folder.close(status, "why")
    first = folder.record["run_id"]
    release(folder)
    again = RunFolder(tmp_path)
    again.claim()
    assert again.start(DESCRIPTION) is True
    record = read_record(tmp_path)
    assert (record["run_id"], record["status"], record["reason"]) == (first, "running", None)
    ended = "killed" if status == "running" else status
    assert [attempt["status"] for attempt in record["attempts"]] == [ended, "running"]
    release(again)


def test_start_into_a_finished_run_is_refused(tmp_path):
    folder = start(tmp_path)
    folder.close("finished")
    release(folder)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UsageError, match="this run is finished"):
        start(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"stage": "dpo"}, "stage: sft -> dpo"),
        ({"recipe": {"lr": 1e-4}}, "recipe: lr: 0.001 -> 0.0001"),
        ({"topology": {"world_size": 2}}, "topology: world_size: 1 -> 2"),
        ({"inputs": {"data": {"path": "/data", "fingerprint": "0" * 64}}}, "input: data: 'ffff"),
        ({"image": {"oci_digest": "sha256:b"}}, "image: oci_digest: 'sha256:a' -> 'sha256:b'"),
        ({"image": None}, "image: oci_digest: 'sha256:a' -> 'unpinned'"),
    ],
)
def test_start_another_run_in_the_folder_is_refused_naming_the_key(tmp_path, changed, line):
    release(start(tmp_path))
    with pytest.raises(UsageError) as raised:
        start(tmp_path, replace(DESCRIPTION, **changed))
    assert f"the folder holds another run: {line}" in str(raised.value)


OTHER = replace(DESCRIPTION, recipe={"lr": 1e-4})


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_start_another_run_after_a_first_try_that_made_nothing_replaces_it(tmp_path, status):
    failed = start(tmp_path)
    for name in ("config.yaml", "slurm/job.sh", ".data.a.tmp/tokens.bin", "model/.w.b.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    failed.close(status, "no such model")
    release(failed)
    folder = start(tmp_path, OTHER)
    record = read_record(tmp_path)
    assert folder.replaced == (
        f"run {failed.record['run_id']} ({status} before it made anything): "
        "recipe: lr: 0.001 -> 0.0001"
    )
    assert record["recipe"] == OTHER.recipe
    assert record["run_id"] != failed.record["run_id"]
    assert [attempt["status"] for attempt in record["attempts"]] == ["running"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "run.json", "slurm"}
    release(folder)


def test_start_the_same_run_after_a_first_try_that_made_nothing_continues_it(tmp_path):
    failed = start(tmp_path)
    failed.close("failed", "no such model")
    release(failed)
    folder = start(tmp_path)
    assert folder.replaced is None
    assert folder.record["run_id"] == failed.record["run_id"]
    release(folder)


@pytest.mark.parametrize(
    "made",
    ["steps.jsonl", "checkpoints/checkpoint-5/trainer_state.json", "chunks/000000.jsonl", "notes"],
)
def test_start_another_run_after_one_that_made_something_is_refused(tmp_path, made):
    failed = start(tmp_path)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("x")
    failed.close("failed", "out of memory")
    release(failed)
    with pytest.raises(UsageError, match="another run: recipe: lr") as raised:
        start(tmp_path, OTHER)
    assert f"begin again: rm -r {tmp_path}" in raised.value.hint
    assert (tmp_path / made).read_text() == "x"


def test_start_another_run_after_one_that_was_killed_is_refused(tmp_path):
    release(start(tmp_path))  # Its record says running: nobody knows why it ended.
    with pytest.raises(UsageError, match="another run: recipe: lr"):
        start(tmp_path, OTHER)


def test_start_another_run_after_a_debug_run_names_the_setting_that_removes_it(tmp_path):
    release(trial(tmp_path))
    with pytest.raises(UsageError) as raised:
        start(tmp_path, OTHER)
    assert "debug.override_existing=true" in raised.value.hint


def test_start_moved_input_with_the_same_content_continues(tmp_path):
    release(start(tmp_path))
    moved = {"data": {"path": "/elsewhere", "fingerprint": "f" * 64}}
    release(start(tmp_path, replace(DESCRIPTION, inputs=moved)))
    assert len(read_record(tmp_path)["attempts"]) == 2


def test_start_other_topology_when_allowed_is_recorded(tmp_path):
    release(start(tmp_path))
    other = replace(DESCRIPTION, topology={"world_size": 2})
    release(start(tmp_path, other, allow_topology=True))
    assert read_record(tmp_path)["attempts"][1]["changed_topology"] == ["world_size: 1 -> 2"]


def test_claim_live_folder_is_refused_and_a_dead_one_is_not(tmp_path):
    release(start(tmp_path))
    script = (
        "import pathlib, signal, sys\n"
        "from post_training.records.run import RunFolder\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1])); folder.claim()\n"
        "print('held', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert is_live(tmp_path)
        with pytest.raises(UsageError, match=rf"a run is live .*process {os.getpid()} on here"):
            RunFolder(tmp_path).claim()
        holder.kill()
    assert not is_live(tmp_path)
    release(start(tmp_path))


def test_claim_on_a_file_system_without_locks_is_no_live_run(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with pytest.raises(UsageError, match="files can't be locked on this file system") as raised:
        RunFolder(tmp_path).claim()
    assert raised.value.exit_code == 2
    with pytest.raises(UsageError, match="files can't be locked on this file system"):
        is_live(tmp_path)


def test_claim_is_kept_by_a_process_that_asks_whether_the_folder_is_live(tmp_path):
    folder = start(tmp_path)
    assert is_live(tmp_path)
    with pytest.raises(UsageError, match="a run is live in this folder"):
        RunFolder(tmp_path).claim()
    release(folder)
    assert not is_live(tmp_path)


def test_is_live_asked_by_somebody_who_may_not_write_there_is_true_to_fact(tmp_path):
    release(start(tmp_path))
    (tmp_path / ".lock").chmod(0o444)
    tmp_path.chmod(0o755)
    asked = (
        "import os, pathlib\n"
        "from post_training.records.run import is_live\n"
        "os.getuid() or os.setuid(65534)\n"
        "print(is_live(pathlib.Path()))"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, stdout=subprocess.PIPE)
    assert done.stdout == b"False\n"


def test_claim_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds no run \(found 'thesis.txt'\)"):
        start(tmp_path)


def test_start_and_remove_trial_leave_what_submit_wrote(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/job.sh").write_text("x")
    release(trial(tmp_path))
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.remove_trial()
    assert (tmp_path / "slurm/job.sh").read_text() == "x"
    assert folder.start(DESCRIPTION) is False
    release(folder)


def test_identity_counts_content_and_not_paths():
    moved = {"data": {"path": "/elsewhere", "fingerprint": "f" * 64}}
    changed = {"data": {"path": "/data", "fingerprint": "0" * 64}}
    assert replace(DESCRIPTION, inputs=moved).identity == DESCRIPTION.identity
    assert replace(DESCRIPTION, facts={}).identity == DESCRIPTION.identity
    assert replace(DESCRIPTION, inputs=changed).identity != DESCRIPTION.identity
    assert replace(DESCRIPTION, image=None).identity != DESCRIPTION.identity


def test_read_whole_record_without_a_key_is_one_clear_line(finished_run):
    path = finished_run("one") / "run.json"
    record = json.loads(path.read_text())
    del record["recipe"], record["seal"]
    path.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"run\.json: no record any more: recipe is gone"):
        read_whole_record(path.parent)
    with pytest.raises(UsageError, match=r"run\.json: no record any more: recipe is gone"):
        finished_run("one")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attempts", []),
        ("attempts", [{}]),
        ("attempts", None),
        ("recipe", []),
        ("outputs", {"files": None}),
        ("inputs", {"data": {}}),
        ("image", "x"),
        ("machine", None),
        ("metrics", None),
        ("packages", 7),
        ("command", None),
        ("mounts", {}),
    ],
)
def test_read_whole_record_with_a_damaged_part_is_one_clear_line(finished_run, key, value):
    path = finished_run("one") / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=rf"run\.json: no record any more: {key} is damaged"):
        read_whole_record(path.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "\0\0\0", "\xff"])
def test_read_record_that_is_none_is_one_clear_line(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"run\.json: (not a JSON record|schema is)"):
        read_record(tmp_path)


def test_read_record_of_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "run.zip").write_text("x")
    with pytest.raises(UsageError, match="a file, and not the folder of a run"):
        read_record(tmp_path / "run.zip")


def test_close_of_a_run_whose_folder_was_removed_brings_nothing_back(tmp_path):
    folder = start(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="folder was removed"):
        folder.close("finished", outputs={"files": {}})
    assert not (tmp_path / "run").exists()
    release(folder)


def test_record_survives_a_write_that_fails(tmp_path, monkeypatch):
    folder = start(tmp_path)
    before = json.loads((tmp_path / "run.json").read_text())
    with pytest.raises(TypeError):
        folder.close("finished", outputs={"not": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == before
    release(folder)


def trial(path: Path) -> RunFolder:
    facts = {**DESCRIPTION.facts, "debug": True}
    return start(path, replace(DESCRIPTION, facts=facts))


def test_remove_trial_empties_the_folder_and_keeps_the_lock(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    release(trial(tmp_path / "run"))
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "weights").write_text("x")
    (tmp_path / "run" / "data").symlink_to(elsewhere)
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.remove_trial()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert (elsewhere / "data").exists()
    assert folder.start(DESCRIPTION) is False
    release(folder)


def test_remove_trial_of_another_run_is_refused(tmp_path):
    release(start(tmp_path))
    before = (tmp_path / "run.json").read_bytes()
    folder = RunFolder(tmp_path)
    folder.claim()
    with pytest.raises(UsageError, match=r"not a debug run, so debug\.override_existing leaves"):
        folder.remove_trial()
    assert (tmp_path / "run.json").read_bytes() == before
    release(folder)


def test_remove_trial_from_a_new_folder_does_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.remove_trial()
    assert folder.start(DESCRIPTION) is False
    release(folder)


def test_start_finished_worker_is_reopened_and_keeps_its_attempts(tmp_path):
    folder = start(tmp_path, reopen=True)
    folder.close("finished")
    release(folder)
    again = start(tmp_path, reopen=True)
    assert [attempt["status"] for attempt in again.record["attempts"]] == ["finished", "running"]
    release(again)
    with pytest.raises(UsageError, match="another run: recipe: lr"):
        start(tmp_path, replace(DESCRIPTION, recipe={"lr": 2e-3}), reopen=True)


def test_start_where_workers_were_before_the_run(tmp_path):
    for name in ("chunks", "workers"):
        (tmp_path / name).mkdir()
    folder = start(tmp_path)
    assert read_record(tmp_path)["status"] == "running"
    release(folder)
