"""`post-training submit sft …` on a real Slurm: a job ends once, and with the same bytes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import wait_until

from post_training.records.run_record import is_live, read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image]

# Long enough for a signal to arrive in the middle.
STEPS = "training.max_steps=15"
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def slurm(start_cluster, cli, image_edf, job):
    """The job's folder and a cluster: slurm.submit("run_dir=jobs/x") -> id, slurm.run(…)."""
    environment = {**os.environ, "SLURM_CONF": str(start_cluster(cli))}
    shutil.copy(image_edf, job / "submitted.toml")

    def run(*argv: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            argv, cwd=job, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    class Slurm:
        def submit(self, *words: str, config: str = "sft.yaml") -> str:
            command = ["submit", "sft", config, "--environment=submitted.toml", *words]
            return run(cli, *command).strip()

        def state(self, job_id: str) -> str:
            return re.search(r"JobState=(\S+)", run("scontrol", "show", "job", job_id))[1]

        def wait(self, job_id: str) -> str:
            """The job's last state; nothing is in the queue then."""
            queue = ("squeue", "--noheader", "--format=%A")
            wait_until(lambda: run(*queue).split() == [], TIMEOUT_S)
            return self.state(job_id)

    Slurm.run = staticmethod(run)
    return Slurm()


@pytest.fixture(scope="module")
def whole(slurm, image_edf, job) -> Path:
    """A submitted run that nobody disturbed; what it was submitted from is spoilt afterwards."""
    shutil.copy(job / "sft.yaml", job / "edited.yaml")
    job_id = slurm.submit(STEPS, "run_dir=jobs/whole", config="edited.yaml")
    (job / "edited.yaml").write_text("model: {path: nowhere}\n")
    (job / "submitted.toml").write_text('image = "/nowhere.sqsh"\n')
    state = slurm.wait(job_id)
    shutil.copy(image_edf, job / "submitted.toml")
    log = (job / f"jobs/whole/slurm/slurm-{job_id}.out").read_text()
    assert state == "COMPLETED", log
    return job / "jobs/whole"


def started(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text() != ""


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
    wait_until(lambda: started(job / "jobs/signalled"))
    # What Slurm sends before the wall time, and in the same way: to the steps alone.
    slurm.run("scancel", "--signal=USR1", job_id)
    assert slurm.wait(job_id) == "COMPLETED"
    record = read_record(job / "jobs/signalled")
    assert [attempt["reason"] for attempt in record["attempts"]] == ["stopped by SIGUSR1", None]
    assert record["outputs"] == read_record(whole)["outputs"]
    log = (job / f"jobs/signalled/slurm/slurm-{job_id}.out").read_text()
    assert log.count("trying again: ") == 1
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", job_id)


@pytest.mark.long
def test_submitted_run_killed_is_counted_and_ends_in_the_same_bytes(slurm, job, whole):
    job_id = slurm.submit(STEPS, "run_dir=jobs/killed", "checkpointing.save_steps=1")
    wait_until(lambda: (job / "jobs/killed/checkpoints/latest").exists())
    slurm.run("scancel", "--signal=KILL", f"{job_id}.0")
    assert slurm.wait(job_id) == "COMPLETED"
    record = read_record(job / "jobs/killed")
    assert [attempt["status"] for attempt in record["attempts"]] == ["running", "finished"]
    assert record["outputs"] == read_record(whole)["outputs"]
    log = (job / f"jobs/killed/slurm/slurm-{job_id}.out").read_text()
    assert "killed by signal 9: failure 1 of 3 that may be tried again" in log


def test_submitted_run_with_a_missing_file_is_not_tried_again(slurm, job):
    job_id = slurm.submit("run_dir=jobs/missing", "data.datasets[0].path=nowhere.jsonl")
    assert slurm.wait(job_id) == "FAILED"
    shown = slurm.run("scontrol", "show", "job", job_id)
    assert "Restarts=0" in shown
    assert "ExitCode=2:0" in shown
    log = (job / f"jobs/missing/slurm/slurm-{job_id}.out").read_text()
    assert "no such file or folder: nowhere.jsonl" in log
    assert log.endswith("stopped: the configuration or the command is wrong\n")


def test_submitted_run_cancelled_is_over_and_may_be_submitted_again(slurm, job):
    job_id = slurm.submit("training.max_steps=5000", "run_dir=jobs/cancelled")
    wait_until(lambda: started(job / "jobs/cancelled"))
    slurm.run("scancel", job_id)
    assert slurm.wait(job_id) == "CANCELLED"
    wait_until(lambda: not is_live(job / "jobs/cancelled"))
    record = read_record(job / "jobs/cancelled")
    assert (len(record["attempts"]), record["reason"]) == (1, "stopped by SIGTERM")
    assert "Restarts=0" in slurm.run("scontrol", "show", "job", job_id)
    again = slurm.submit("training.max_steps=5000", "run_dir=jobs/cancelled", "--dry-run")
    assert "job.sh" in again
