"""Faults injected into submitted runs on a real Slurm: nothing lost beyond the last checkpoint, no
run twice, no silent end."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.kept_bytes import kept_bytes
from helpers.slurm_cluster import wait_until
from helpers.submitted_jobs import SubmittedJobs
from post_training.records.run import is_live
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image, pytest.mark.long]

STEPS = ("training.max_steps=15", "checkpointing.save_steps=2")
TWO_NODES = (*STEPS, "--nodes=2")


@pytest.fixture(scope="module")
def slurm(start_cluster, cli, image_edf, job) -> SubmittedJobs:
    """Three nodes. Their names mean this machine inside the image, and nothing outside."""
    (job / "hosts").write_text("127.0.0.1 localhost n1 n2 n3\n")
    (job / "submitted.toml").write_text(
        f'base_environment = "{image_edf}"\nmounts = ["{job}/hosts:/etc/hosts:ro"]\n'
        '[env]\nGLOO_SOCKET_IFNAME = "lo"\n'
    )
    return SubmittedJobs(start_cluster(cli, NODES="3"), cli, job)


@pytest.fixture(scope="module")
def two_nodes(slurm, job) -> dict:
    """The outputs of a run on two nodes that nobody disturbed."""
    job_id = slurm.submit(*TWO_NODES, "run_dir=faults/whole")
    assert slurm.wait(job_id) == "COMPLETED", slurm.log("faults/whole", job_id)
    record = read_record(job / "faults/whole")
    assert record["topology"]["world_size"] == 2
    return kept_bytes(record)


def test_run_on_two_nodes_is_reproduced_on_two_nodes(slurm, job, two_nodes):
    words = ("reproduce", "faults/whole", "--site=laptop")
    told = slurm.post_training(*words, "--nodes=2")
    assert told.startswith("identical: ")
    again = read_record(job / "faults/whole-reproduced-1")
    assert again["environment"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    slurm.post_training(*words, "--nodes=3", check=False)
    assert "2 ranks do not fill 3 nodes of 1 tasks" in slurm.stderr


@contextmanager
def held(slurm: SubmittedJobs) -> Iterator[None]:
    """No job starts within."""
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        yield
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")


def checkpointed(run_dir: Path):
    return lambda: (run_dir / "checkpoints/latest").exists()


def rank_processes(run_dir: Path) -> dict[str, int]:
    """{SLURM_PROCID: process} of the run's ranks, which are processes of this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode().split("\0")
            variables = (path / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        if f"{run_dir}/slurm/config.yaml" in command and command[0].endswith("python"):
            ranks = [word for word in variables if word.startswith("SLURM_PROCID=")]
            found[ranks[0].removeprefix("SLURM_PROCID=")] = int(path.name)
    return found


def slurmstepd_of(task: int) -> int:
    """The process among a task's ancestors."""
    status = Path(f"/proc/{task}/status").read_text()
    if status.startswith("Name:\tslurmstepd"):
        return task
    return slurmstepd_of(int(status.split("PPid:")[1].split()[0]))


@pytest.fixture
def watched_closely(slurm, tmp_path) -> Iterator[None]:
    (tmp_path / "post-training").mkdir()
    (tmp_path / "post-training/sites.yaml").write_text("laptop: {watch_s: 2}\n")
    slurm.environment["XDG_CONFIG_HOME"] = str(tmp_path)
    yield
    del slurm.environment["XDG_CONFIG_HOME"]


def slurmd_of(slurm: SubmittedJobs, node: str) -> int:
    conf = Path(slurm.environment["SLURM_CONF"])
    return int((conf.parent / f"slurmd-{node}.pid").read_text())


def test_fault_killed_rank_is_named_left_out_and_ends_in_the_same_bytes(slurm, job, two_nodes):
    job_id = slurm.submit(*TWO_NODES, "run_dir=faults/rank")
    wait_until(checkpointed(job / "faults/rank"))
    assert slurm.shown(job_id)["NodeList"] == "n[1-2]"
    os.kill(rank_processes(job / "faults/rank")["1"], signal.SIGKILL)
    assert slurm.wait(job_id) == "COMPLETED"
    log = slurm.log("faults/rank", job_id)
    assert "(suspected: n2): failure 1 of 3 that may be tried again" in log
    shown = slurm.shown(job_id)
    assert (shown["ExcNodeList"], shown["NodeList"]) == ("n2", "n[1,3]")
    assert kept_bytes(read_record(job / "faults/rank")) == two_nodes


@pytest.mark.usefixtures("watched_closely")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_fault_killed_slurmstepd_is_noticed_and_ends_in_the_same_bytes(slurm, job, two_nodes, rank):
    run_dir = f"faults/slurmstepd-{rank}"
    job_id = slurm.submit(*TWO_NODES, f"run_dir={run_dir}")
    wait_until(checkpointed(job / run_dir))
    os.kill(slurmstepd_of(rank_processes(job / run_dir)[rank]), signal.SIGKILL)
    assert slurm.wait(job_id) == "COMPLETED", slurm.log(run_dir, job_id)
    assert "the stage has ended, and srun has not noticed" in slurm.log(run_dir, job_id)
    assert slurm.shown(job_id)["Restarts"] == "1"
    assert kept_bytes(read_record(job / run_dir)) == two_nodes


def test_fault_lost_node_the_job_goes_on_with_another(slurm, job, two_nodes):
    job_id = slurm.submit(*TWO_NODES, "run_dir=faults/node")
    wait_until(checkpointed(job / "faults/node"))
    rank = rank_processes(job / "faults/node")["1"]
    os.kill(slurmd_of(slurm, "n2"), signal.SIGKILL)
    # As slurmctld does once SlurmdTimeout is over; the node's tasks are gone with it.
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    os.kill(rank, signal.SIGKILL)
    assert slurm.wait(job_id) == "COMPLETED"
    assert slurm.shown(job_id)["NodeList"] == "n[1,3]"
    assert len(slurm.attempts("faults/node")) == 2
    assert kept_bytes(read_record(job / "faults/node")) == two_nodes
    subprocess.run(["slurmd", "-N", "n2"], env=slurm.environment, check=True)
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)


@pytest.fixture(scope="module")
def whole(slurm, job) -> dict:
    """The outputs of a run on one node that nobody disturbed."""
    job_id = slurm.submit(*STEPS, "run_dir=faults/alone")
    assert slurm.wait(job_id) == "COMPLETED", slurm.log("faults/alone", job_id)
    return kept_bytes(read_record(job / "faults/alone"))


@pytest.mark.parametrize("moment", ["preparing", "checkpoint", "twice"])
def test_fault_usr1_at_an_awkward_moment_ends_in_the_same_bytes(slurm, job, whole, moment):
    run_dir = job / f"faults/usr1-{moment}"
    job_id = slurm.submit(*STEPS, f"run_dir=faults/usr1-{moment}")
    moments = {
        "preparing": lambda: (run_dir / "run.json").exists(),
        "checkpoint": lambda: any((run_dir / "checkpoints").glob("*")),
        "twice": checkpointed(run_dir),
    }
    wait_until(moments[moment])
    slurm.run("scancel", "--signal=USR1", job_id)
    if moment == "twice":
        slurm.run("scancel", "--signal=USR1", job_id, check=False)
    assert slurm.wait(job_id) == "COMPLETED", slurm.log(f"faults/usr1-{moment}", job_id)
    assert slurm.shown(job_id)["Restarts"] == "1"
    assert [status for status, _ in slurm.attempts(f"faults/usr1-{moment}")] == [
        "interrupted", "finished",
    ]  # fmt: skip
    assert kept_bytes(read_record(run_dir)) == whole


def test_fault_full_disk_in_a_checkpoint_is_final_and_goes_on_with_room(slurm, job, whole):
    disk = job / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], check=True)
    try:
        job_id = slurm.submit(*STEPS, "run_dir=small/run")
        assert slurm.wait(job_id) == "FAILED"
        assert slurm.shown(job_id)["Restarts"] == "0"
        assert "cannot write: " in slurm.log("small/run", job_id)
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        job_id = slurm.submit(*STEPS, "run_dir=small/run")
        assert slurm.wait(job_id) == "COMPLETED", slurm.log("small/run", job_id)
        assert kept_bytes(read_record(disk / "run")) == whole
    finally:
        subprocess.run(["umount", disk], check=True)


def test_fault_image_gone_while_queued_ends_with_its_name(slurm, job, image_edf):
    text = image_edf.read_text()
    path = Path(text.split('\nimage = "')[1].split('"')[0])
    link = path.with_name("of-a-test.sqsh")
    os.link(path, link)
    (job / "gone.toml").write_text(text.replace(str(path), str(link)))
    words = ("submit", "sft", "sft.yaml", "--environment=./gone.toml", "run_dir=faults/image")
    try:
        with held(slurm):
            job_id = slurm.post_training(*words).strip()
            link.unlink()
    finally:
        link.unlink(missing_ok=True)
    assert slurm.wait(job_id) == "FAILED"
    assert "no such image" in slurm.log("faults/image", job_id)
    assert slurm.shown(job_id)["Restarts"] == "0"


def test_fault_run_folder_gone_while_queued_ends_and_leaves_nothing(slurm, job):
    with held(slurm):
        job_id = slurm.submit(*STEPS, "run_dir=faults/gone")
        shutil.rmtree(job / "faults/gone")
    assert slurm.wait(job_id) == "FAILED"
    assert slurm.shown(job_id)["Restarts"] == "0"
    assert not (job / "faults/gone/run.json").exists()


def test_fault_run_folder_gone_while_running_ends_and_is_not_begun_over(slurm, job):
    job_id = slurm.submit("training.max_steps=3000", *STEPS[1:], "run_dir=faults/removed")
    wait_until(checkpointed(job / "faults/removed"))
    (job / "faults/removed").rename(job / "faults/elsewhere")
    assert slurm.wait(job_id) == "FAILED"
    assert slurm.shown(job_id)["Restarts"] == "0"
    assert not is_live(job / "faults/elsewhere")
    record = read_record(job / "faults/removed")
    assert (record["status"], len(record["attempts"])) == ("failed", 1)
