"""A cluster that keeps accounts: what Slurm says of jobs it has forgotten, and of two qualities of
service one that takes the other's nodes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.accounting import accounting, missing
from helpers.kept_bytes import kept_bytes
from helpers.slurm_cluster import Cluster, run_script, wait_until
from helpers.submitted_jobs import SubmittedJobs
from post_training.records.run_record import read_record
from post_training.slurm.queue import read_ended_jobs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]


QOS = """\
PreemptType=preempt/qos
AccountingStorageEnforce=associations,qos
"""


@contextmanager
def accounted(slurm_conf: Path, settings: str) -> Iterator[None]:
    """Within, the cluster keeps accounts, with further settings, of which the last one said counts.
    Afterwards it is down."""
    with open(slurm_conf, "a") as file:
        file.write(settings)
    with accounting(slurm_conf):
        yield
        down = run_script("down", str(slurm_conf.parent))
        assert down.returncode == 0, down.stderr


@pytest.fixture
def forgetful(start_cluster, runner, folder) -> Iterator[Cluster]:
    """Its controller forgets a job soon after its end."""
    slurm_conf = start_cluster(runner)
    with accounted(slurm_conf, "MinJobAge=2\n"):
        yield Cluster(slurm_conf, folder(), folder())


def test_ended_jobs_are_known_from_accounts_when_the_controller_has_forgotten(
    forgetful, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", str(forgetful.slurm_conf))

    def submit(*words: str) -> str:
        done = forgetful.run("sbatch", "--parsable", "--output=/dev/null", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    well, badly = submit("--wrap=true"), submit("--wrap=exit 3")
    array = submit("--array=0-1", "--wrap=exit $SLURM_ARRAY_TASK_ID")
    cancelled = submit("--hold", "--wrap=true")
    assert forgetful.run("scancel", cancelled).returncode == 0
    pending = submit("--hold", "--wrap=true")
    asked = [well, badly, array, cancelled, pending, "999"]
    expected = {
        well: "completed", badly: "failed", array: "failed", cancelled: "cancelled by 0",
    }  # fmt: skip
    wait_until(lambda: read_ended_jobs(asked) == expected)

    def remembered() -> set[str]:
        listed = forgetful.run("squeue", "--noheader", "--states=all", "--format=%F").stdout
        return set(listed.split())

    wait_until(lambda: remembered() == {pending})
    assert read_ended_jobs(asked) == expected


@pytest.mark.image
def test_run_preempted_by_a_quality_of_service_ends_in_the_same_bytes(
    start_cluster, cli, image_edf, job
):
    shutil.copy(image_edf, job / "submitted.toml")
    slurm_conf = start_cluster(cli)
    slurm = SubmittedJobs(slurm_conf, cli, job)
    words = ("training.max_steps=15", "checkpointing.save_steps=2")
    with accounted(slurm_conf, QOS):
        for entity in (
            "account tests",
            "user root account=tests",
            "qos urgent priority=10 preempt=normal",
        ):
            slurm.run("sacctmgr", "--immediate", "add", *entity.split())
        slurm.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "qos=normal,urgent")
        whole = slurm.submit(*words, "run_dir=qos/whole")
        assert slurm.wait(whole) == "COMPLETED", slurm.log("qos/whole", whole)
        job_id = slurm.submit(*words, "run_dir=qos/preempted", "--max-failures=0")
        wait_until((job / "qos/preempted/checkpoints/latest").exists)
        slurm.run("sbatch", "--qos=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
        assert slurm.wait(job_id) == "COMPLETED", slurm.log("qos/preempted", job_id)
        assert slurm.shown(job_id)["Restarts"] == "1"
    whole, preempted = (read_record(job / f"qos/{name}") for name in ("whole", "preempted"))
    assert kept_bytes(preempted) == kept_bytes(whole)
