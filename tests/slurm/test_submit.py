"""`post-training submit sft …` on a real Slurm: a job ends once, and with the same bytes."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.kept_bytes import kept_bytes
from helpers.slurm_cluster import wait_until
from helpers.submitted_jobs import SubmittedJobs
from post_training.records.run import is_live
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image]

# Long enough for a signal to arrive in the middle.
STEPS = "training.max_steps=15"


@pytest.fixture(scope="module")
def slurm(start_cluster, cli, image_edf, job) -> SubmittedJobs:
    shutil.copy(image_edf, job / "submitted.toml")
    return SubmittedJobs(start_cluster(cli), cli, job)


@pytest.fixture(scope="module")
def whole(slurm, image_edf, job) -> Path:
    """A submitted run that nobody disturbed; what it was submitted from is spoilt afterwards."""
    shutil.copy(job / "sft.yaml", job / "edited.yaml")
    job_id = slurm.submit(STEPS, "run_dir=jobs/whole", config="edited.yaml")
    (job / "edited.yaml").write_text("model: {path: nowhere}\n")
    (job / "submitted.toml").write_text('image = "/nowhere.sqsh"\n')
    state = slurm.wait(job_id)
    shutil.copy(image_edf, job / "submitted.toml")
    log = slurm.log("jobs/whole", job_id)
    assert state == "COMPLETED", log
    return job / "jobs/whole"


def test_submitted_run_edited_while_queued_runs_as_it_was_submitted(whole):
    record = read_record(whole)
    job_id = json.loads((whole / "slurm/submission.json").read_text())["job_id"]
    assert record["status"] == "finished"
    assert record["recipe"]["training.max_steps"] == 15
    assert record["scheduler_job"] == f"{job_id}.0"
    assert record["image"]["verified_by"] == "runner"
    assert not (whole / "slurm/failures.json").exists()


def test_submitted_run_signalled_is_requeued_once_and_ends_in_the_same_bytes(slurm, job, whole):
    job_id = slurm.submit(STEPS, "run_dir=jobs/signalled")
    slurm.wait_for_steps("jobs/signalled")
    # What Slurm sends before the wall time, and in the same way: to the steps alone.
    slurm.run("scancel", "--signal=USR1", job_id)
    assert slurm.wait(job_id) == "COMPLETED"
    record = read_record(job / "jobs/signalled")
    assert [attempt["reason"] for attempt in record["attempts"]] == ["stopped by SIGUSR1", None]
    assert kept_bytes(record) == kept_bytes(read_record(whole))
    log = slurm.log("jobs/signalled", job_id)
    assert log.count("trying again: ") == 1
    assert slurm.shown(job_id)["Restarts"] == "1"


@pytest.mark.long
def test_submitted_run_killed_is_counted_and_ends_in_the_same_bytes(slurm, job, whole):
    job_id = slurm.submit(STEPS, "run_dir=jobs/killed", "checkpointing.save_steps=1")
    wait_until(lambda: (job / "jobs/killed/checkpoints/latest").exists())
    slurm.run("scancel", "--signal=KILL", f"{job_id}.0")
    assert slurm.wait(job_id) == "COMPLETED"
    record = read_record(job / "jobs/killed")
    assert [attempt["status"] for attempt in record["attempts"]] == ["killed", "finished"]
    assert kept_bytes(record) == kept_bytes(read_record(whole))
    log = slurm.log("jobs/killed", job_id)
    assert "killed by signal 9 (suspected: n1): failure 1 of 3 that may be tried again" in log


def test_submitted_run_that_the_queue_alone_knows_is_not_queued_twice(slurm, job):
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        job_id = slurm.submit(STEPS, "run_dir=jobs/unknown")
        # As if the command had been killed before it wrote down the id.
        (job / "jobs/unknown/slurm/submission.json").unlink()
        command = ("submit", "sft", "sft.yaml", "--environment=submitted.toml")
        slurm.post_training(*command, STEPS, "run_dir=jobs/unknown", check=False)
        assert f"job {job_id} is already in the queue for this folder (pending)" in slurm.stderr
        slurm.run("scancel", job_id)
        slurm.wait()
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")


def test_submitted_run_with_a_missing_file_is_not_tried_again(slurm, job):
    job_id = slurm.submit("run_dir=jobs/missing", "data.datasets[0].path=nowhere.jsonl")
    assert slurm.wait(job_id) == "FAILED"
    shown = slurm.shown(job_id)
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "2:0")
    log = slurm.log("jobs/missing", job_id)
    assert "no such file or folder: nowhere.jsonl" in log
    assert log.endswith("stopped: the configuration or the command is wrong\n")


def test_submitted_run_cancelled_is_over_and_may_be_submitted_again(slurm, job):
    job_id = slurm.submit("training.max_steps=5000", "run_dir=jobs/cancelled")
    slurm.wait_for_steps("jobs/cancelled")
    slurm.run("scancel", job_id)
    assert slurm.wait(job_id) == "CANCELLED"
    wait_until(lambda: not is_live(job / "jobs/cancelled"))
    record = read_record(job / "jobs/cancelled")
    assert (len(record["attempts"]), record["reason"]) == (1, "stopped by SIGTERM")
    assert slurm.shown(job_id)["Restarts"] == "0"
    again = slurm.submit("training.max_steps=5000", "run_dir=jobs/cancelled", "--dry-run")
    assert "job.sh" in again


@pytest.mark.long
def test_submitted_chain_goes_on_in_the_next_job_and_ends_with_its_run(slurm, job, whole):
    first = slurm.submit(STEPS, "run_dir=jobs/chain", "--chain=3")
    second, third = str(int(first) + 1), str(int(first) + 2)
    slurm.wait_for_steps("jobs/chain")
    slurm.run("scancel", "--signal=USR1", first)
    assert slurm.wait(first) == "FAILED"
    assert (slurm.state(second), slurm.state(third)) == ("COMPLETED", "CANCELLED")
    record = read_record(job / "jobs/chain")
    jobs = [attempt["scheduler_job"].split(".")[0] for attempt in record["attempts"]]
    assert jobs == [first, second]
    assert kept_bytes(record) == kept_bytes(read_record(whole))


@pytest.mark.long
def test_submitted_chain_cancelled_in_its_first_job_does_not_go_on(slurm):
    first = slurm.submit("training.max_steps=5000", "run_dir=jobs/ended", "--chain=3")
    slurm.wait_for_steps("jobs/ended")
    slurm.run("scancel", first)
    slurm.wait()
    assert len(slurm.attempts("jobs/ended")) == 1
    second = str(int(first) + 1)
    assert slurm.state(second) == "FAILED"
    assert "stopped: the attempt before was cancelled" in slurm.log("jobs/ended", second)


@pytest.mark.long
def test_submitted_command_stopped_by_a_signal_goes_on_in_its_next_attempt(slurm, job):
    script = "test -e began && { cp began out; exit; }; echo 1 > began; while :; do sleep 0.1; done"
    settings = {
        "command": ["sh", "-c", script],
        "outputs": [{"name": "made", "path": "out"}],
        "on_restart": "continue",
    }
    (job / "command.yaml").write_text(json.dumps(settings))
    job_id = slurm.submit("run_dir=jobs/command", stage="exec", config="command.yaml")
    wait_until((job / "jobs/command/work/began").exists)
    slurm.run("scancel", "--signal=USR1", job_id)
    assert slurm.wait(job_id) == "COMPLETED"
    record = read_record(job / "jobs/command")
    assert [attempt["reason"] for attempt in record["attempts"]] == ["stopped by SIGUSR1", None]
    assert record["image"]["verified_by"] == "runner"
    assert (job / "jobs/command/made/out").read_text() == "1\n"


def test_submitted_run_is_reproduced_by_a_job_of_the_same_site(slurm, whole):
    assert slurm.post_training("reproduce", whole, "--site", "laptop").startswith("identical: ")
    again = read_record(whole.with_name("whole-reproduced-1"))
    assert again["scheduler_job"] != read_record(whole)["scheduler_job"]
