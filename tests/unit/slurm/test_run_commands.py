"""runs list, logs and cancel, with stand-ins for Slurm's programs."""

import json
from pathlib import Path

import pytest

from post_training.core.files import write_json
from post_training.records.run import RunFolder
from post_training.records.run_record import identity_of

RECORD = Path(__file__).parents[1] / "records/record_of_the_first_version.json"
MIX = "{data: {datasets: [{path: rows.jsonl}]}, run_dir: runs/one}"
LINE = {"step": 5, "epoch": 0.5, "loss": 2.5, "num_tokens": 10, "num_sequences": 4}
TIMING = {"step_s": 2.0, "tokens_per_s": 1234.5}


@pytest.fixture
def command(slurm_command, tmp_path):
    """A submitted run in runs/one, as job 77; command("runs", "list", queue=…)."""
    (tmp_path / "mix.yaml").write_text(MIX)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = slurm_command("submit", "mix", "mix.yaml", "--environment=./post-training.toml")
    assert done.returncode == 0, done.stderr
    return slurm_command


def attempt(status: str, reason: str | None) -> dict:
    return {"status": status, "reason": reason, "started": "a", "ended": "b", "scheduler_job": "77"}


def write_record(run_dir, status: str, reason: str | None, recipe: dict, *earlier: dict) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    attempts = [*earlier, attempt(status, reason)]
    record = {
        **json.loads(RECORD.read_text()),
        "status": status,
        "reason": reason,
        "recipe": recipe,
        "attempts": attempts,
        "outputs": None,
    }
    write_json(run_dir / "run.json", {**record, "identity": identity_of(record)})


def listed(command, queue: str = "") -> dict:
    done = command("runs", "list", "--json", queue=queue)
    assert done.returncode == 0, done.stderr
    (state,) = json.loads(done.stdout)
    return state


@pytest.mark.parametrize(
    ("queue", "record", "state", "reason"),
    [
        ("77 PENDING Priority\n", None, "queued", None),
        ("77 PENDING Dependency\n", None, "waiting", None),
        ("77 RUNNING None\n", None, "running", None),
        ("77 PENDING BeginTime\n", ("interrupted", "stopped by SIGUSR1"), "queued",
         "stopped by SIGUSR1"),
        ("77 PENDING BeginTime\n", ("running", None), "queued", "killed"),
        ("", None, "ended", "before the run was opened; no "),
        ("", ("failed", "no such file"), "failed", "no such file"),
        ("", ("running", None), "killed", "its record was never closed"),
        ("", ("finished", None), "finished", None),
        ("77 COMPLETING None\n", ("finished", None), "finished", None),
    ],
)  # fmt: skip
def test_runs_list_state_is_of_slurm_and_the_record(
    command, tmp_path, queue, record, state, reason
):
    if record:
        write_record(tmp_path / "runs/one", *record, {})
    told = listed(command, queue)
    assert (told["state"], told["job_ids"]) == (state, ["77"])
    assert (told["reason"] or "").startswith(reason or "")
    assert (told["reason"] is None) == (reason is None)
    if record:
        shown = json.loads(command("runs", "show", "runs/one", "--json", queue=queue).stdout)
        assert (shown["state"], shown["status"]) == (state, record[0])


@pytest.mark.parametrize(
    ("recipe", "done", "time_left_s"),
    [
        ({"training.max_steps": 20}, 0.25, 30.0),
        ({"training.max_steps": 4, "training.iteration_offset": 3}, 0.5, 4.0),
        ({"training.max_steps": None, "training.num_train_epochs": 2}, 0.25, 30.0),
        ({"training.num_training_tokens": 100}, 0.1, 90.0),
        ({"training.num_training_samples": 8}, 0.5, 10.0),
        ({}, None, None),
    ],
)
def test_runs_list_running_run_says_how_far_it_is(command, tmp_path, recipe, done, time_left_s):
    run_dir = tmp_path / "runs/one"
    write_record(run_dir, "running", None, recipe, attempt("interrupted", "stopped by SIGUSR1"))
    evaluation = {"step": 5, "eval": {"loss": 9.0}, "timing": {}}
    lines = [{**LINE, "step": 4}, {**LINE, "timing": TIMING}, evaluation]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    told = listed(command, "77 RUNNING None\n")
    assert (told["step"], told["loss"], told["tokens_per_s"]) == (5, 2.5, 1234.5)
    assert (told["done"], told["time_left_s"]) == (done, time_left_s)
    assert [each["reason"] for each in told["attempts"]] == ["stopped by SIGUSR1", None]


def test_runs_list_table_has_a_line_for_each_run_and_none_for_workers(command, tmp_path):
    write_record(tmp_path / "runs/two", "finished", None, {})
    write_record(tmp_path / "runs/two/workers/0", "finished", None, {})
    run = RunFolder(tmp_path / "runs/local")
    run.claim()
    write_record(tmp_path / "runs/local", "running", None, {})
    done = command("runs", "list", queue="77 PENDING Priority\n")
    run._lock.close()
    header, *lines = [line.split() for line in done.stdout.splitlines()]
    assert header[:4] == ["run", "stage", "state", "job"]
    assert lines == [
        ["runs/local", "sft", "running", "1"],
        ["runs/one", "queued", "77"],
        ["runs/two", "sft", "finished", "1", "100%"],
    ]


SACCT = "77|CANCELLED by 1000\n77_0|FAILED\n76|TIMEOUT\n"


@pytest.mark.parametrize(
    ("record", "state", "reason"),
    [
        (None, "ended", "before the run was opened; no "),
        (("running", None), "killed", "its record was never closed"),
        (("interrupted", "stopped by SIGTERM"), "interrupted", "stopped by SIGTERM"),
    ],
)
@pytest.mark.parametrize("accounting", [SACCT, None])
def test_runs_list_of_what_is_over_says_how_slurm_ended_the_job(
    command, tmp_path, record, state, reason, accounting
):
    if record:
        write_record(tmp_path / "runs/one", *record, {})
    expected = "cancelled by 1000"
    if accounting is None:
        expected = "out_of_memory"
        (tmp_path / "bin/ended").write_text(
            "CLUSTER: west\n76|TIMEOUT\n77|OUT_OF_MEMORY\n78|RUNNING\n79|\n"
        )
    else:
        (tmp_path / "bin/accounting").write_text(accounting)
    told = listed(command)
    assert (told["state"], told["slurm_state"]) == (state, expected)
    assert told["reason"].startswith(reason)
    assert f"(Slurm: {expected})" in command("runs", "list").stdout


def test_runs_list_asks_slurm_for_the_job_of_the_last_attempt(command, tmp_path):
    path = tmp_path / "runs/one/slurm/submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "other_job_ids": ["78"]}))
    write_record(tmp_path / "runs/one", "running", None, {})
    record = json.loads((tmp_path / "runs/one/run.json").read_text())
    record["attempts"][-1]["scheduler_job"] = "78.0"
    write_json(tmp_path / "runs/one/run.json", record)
    (tmp_path / "bin/accounting").write_text("77|TIMEOUT\n78|NODE_FAIL\n")
    assert listed(command)["slurm_state"] == "node_fail"


def test_runs_list_of_what_slurm_has_forgotten_says_what_the_record_does(command, tmp_path):
    (tmp_path / "bin/accounting").write_text("76|TIMEOUT\n77|RUNNING\n")
    write_record(tmp_path / "runs/one", "running", None, {})
    assert listed(command)["slurm_state"] is None


def test_runs_list_chunks_that_are_done_are_its_progress(command, tmp_path):
    write_record(tmp_path / "runs/one", "running", None, {})
    chunks = tmp_path / "runs/one/chunks"
    chunks.mkdir()
    (chunks / "manifest.json").write_text('{"chunks": [1, 2, 3, 4]}')
    for name in ("000000.json", "000000.jsonl", "000001.jsonl"):
        (chunks / name).touch()
    assert listed(command, "77 RUNNING None\n")["done"] == 0.25


def test_runs_logs_prints_the_end_of_the_jobs_log(command, tmp_path):
    (tmp_path / "runs/one/slurm/slurm-77.out").write_text("one\ntwo\nthree\n")
    assert command("runs", "logs", "runs/one", "-n", "2").stdout == "two\nthree\n"


def test_runs_logs_of_what_has_none_is_refused(command, tmp_path):
    assert "the job has not started" in command("runs", "logs", "runs/one").stderr
    assert "the run has no workers" in command("runs", "logs", "runs/one", "--worker=0").stderr
    (tmp_path / "other").mkdir()
    assert "no log: the run was not submitted" in command("runs", "logs", "other").stderr


def test_runs_cancel_cancels_what_is_queued_below_the_folder(command, tmp_path):
    command("submit", "mix", "mix.yaml", "--environment=./post-training.toml", "run_dir=runs/two")
    done = command("runs", "cancel", "runs", queue="77 RUNNING None\n78 PENDING x\n76 RUNNING y\n")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bin/cancelled").read_text() == "78 77\n"


def test_runs_cancel_of_what_is_not_queued_is_refused(command, tmp_path):
    done = command("runs", "cancel", "runs/one", queue="76 RUNNING y\n")
    assert done.returncode == 2
    assert "no job of it is in Slurm's queue" in done.stderr
    assert not (tmp_path / "bin/cancelled").exists()
