"""What Slurm takes away from a run on a real Slurm: its nodes for a more urgent job, its memory."""

import json
import shutil

import pytest

from helpers.kept_bytes import kept_bytes
from helpers.slurm_cluster import wait_until
from helpers.submitted_jobs import SubmittedJobs
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image, pytest.mark.long]

STEPS = ("training.max_steps=15", "checkpointing.save_steps=2")
# Once: it is killed for it, and its next attempt is not hungry any more.
HUNGRY = """
from pathlib import Path
from post_training.data.transforms import register_transform

@register_transform("hungry")
def hungry(row):
    eaten = Path("ONCE")
    if not eaten.exists():
        eaten.touch()
        bytearray(4 << 30)
    return row
"""


@pytest.fixture(scope="module")
def slurm(start_cluster, cli, image_edf, job) -> SubmittedJobs:
    shutil.copy(image_edf, job / "submitted.toml")
    return SubmittedJobs(start_cluster(cli, MEMORY_LIMITS="1"), cli, job)


@pytest.fixture(scope="module")
def whole(slurm, job) -> dict:
    """The outputs of a run that nothing was taken from."""
    job_id = slurm.submit(*STEPS, "run_dir=taken/whole")
    assert slurm.wait(job_id) == "COMPLETED", slurm.log("taken/whole", job_id)
    return kept_bytes(read_record(job / "taken/whole"))


def preempt(slurm: SubmittedJobs, run_dir: str, *, grace_s: int) -> None:
    """Take the node from the run once it has a checkpoint; the urgent job is over soon."""
    slurm.run("scontrol", "update", "PartitionName=main", f"GraceTime={grace_s}")
    wait_until((slurm.folder / run_dir / "checkpoints/latest").exists)
    slurm.run("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")


@pytest.mark.parametrize("grace_s", [0, 90])
def test_preempted_run_goes_back_to_the_queue_and_ends_in_the_same_bytes(
    slurm, job, whole, grace_s
):
    run_dir = f"taken/preempted-{grace_s}"
    job_id = slurm.submit(*STEPS, f"run_dir={run_dir}", "--max-failures=0")
    preempt(slurm, run_dir, grace_s=grace_s)
    assert slurm.wait(job_id) == "COMPLETED", slurm.log(run_dir, job_id)
    assert slurm.shown(job_id)["Restarts"] == "1"
    assert kept_bytes(read_record(job / run_dir)) == whole
    log = slurm.log(run_dir, job_id)
    assert "attempt 2 of job" in log
    if grace_s:  # Else it has as long as KillWait: too short to be sure of a last checkpoint.
        assert slurm.attempts(run_dir) == [
            ("interrupted", "stopped by SIGTERM"), ("finished", None),
        ]  # fmt: skip
        assert "trying again: stopped by Slurm, at checkpoint-" in log


@pytest.mark.parametrize("grace_s", [0, 90])
def test_preempted_chain_goes_on_in_its_next_job(slurm, job, whole, grace_s):
    run_dir = f"taken/chain-{grace_s}"
    first = slurm.submit(*STEPS, f"run_dir={run_dir}", "--chain=2")
    preempt(slurm, run_dir, grace_s=grace_s)
    assert slurm.wait(first) == ("FAILED" if grace_s else "PREEMPTED")
    second = str(int(first) + 1)
    assert slurm.state(second) == "COMPLETED", slurm.log(run_dir, second)
    assert kept_bytes(read_record(job / run_dir)) == whole


def test_run_killed_for_its_memory_by_the_node_is_tried_again(slurm, job):
    eaten = job / "eaten"
    (job / "hungry.py").write_text(HUNGRY.replace("ONCE", str(eaten)))
    (job / "hungry.yaml").write_text(
        "data: {transforms: [hungry.py], datasets: [{path: sums.jsonl, transform: hungry}]}\n"
    )
    job_id = slurm.submit("run_dir=taken/memory", stage="mix", config="hungry.yaml")
    assert slurm.wait(job_id) == "COMPLETED", slurm.log("taken/memory", job_id)
    assert len(slurm.attempts("taken/memory")) == 2
    log = slurm.log("taken/memory", job_id)
    assert "trying again: killed for its memory by the node (suspected: n1): failure 1 of 3" in log
    eaten.unlink()
    words = ("run_dir=taken/all-memory", "--max-failures=0")
    job_id = slurm.submit(*words, stage="mix", config="hungry.yaml")
    slurm.wait(job_id)
    assert "killed for its memory by the node" in slurm.log("taken/all-memory", job_id)
    (told,) = json.loads(slurm.post_training("runs", "list", "taken/all-memory", "--json"))
    # The step was killed; the job's script went on, and gave its exit code.
    assert (told["state"], told["slurm_state"]) == ("killed", "failed")
