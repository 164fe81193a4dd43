"""`srun --environment=post-training.toml entrypoint …` on a real Slurm, in the built image."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.kept_bytes import kept_bytes
from helpers.slurm_cluster import TIMEOUT_S, wait_until
from post_training.records.run import is_live
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image]


@pytest.fixture(scope="module")
def srun(start_cluster, cli, image_edf, job):
    """Run srun in the job's folder, which holds post-training.toml: srun("-n2", "true")."""
    environment = {**os.environ, "SLURM_CONF": str(start_cluster(cli))}
    shutil.copy(image_edf, job / "post-training.toml")

    def run(*arguments: str, environment_file: str = "post-training.toml"):
        return subprocess.run(
            ["srun", f"--environment={environment_file}", *arguments],
            cwd=job,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    run.environment = environment
    return run


def test_srun_bare_toml_name_in_the_working_folder_runs_in_the_image(srun, job):
    done = srun("cat", "/etc/post-training/image.json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["input_hash"] in (job / "post-training.toml").read_text()


def test_srun_entrypoint_leaves_the_same_bytes_and_the_job_in_the_record(srun, job):
    done = srun("entrypoint", "sft", "sft.yaml", "run_dir=slurm")
    assert done.returncode == 0, done.stderr
    record = read_record(job / "slurm")
    assert record["scheduler_job"].split(".")[0].isdigit()
    assert record["attempts"][0]["scheduler_job"] == record["scheduler_job"]
    assert record["image"]["verified_by"] == "runner"
    assert kept_bytes(record) == kept_bytes(read_record(job / "run"))


def test_srun_two_tasks_are_two_ranks_of_one_run(srun, job):
    done = srun("--ntasks=2", "entrypoint", "sft", "sft.yaml", "run_dir=slurm-two")
    assert done.returncode == 0, done.stderr
    record = read_record(job / "slurm-two")
    assert record["topology"]["world_size"] == 2
    assert len(record["attempts"]) == 1


def test_srun_pty_gives_a_shell_inside(srun, job):
    typed = "cat /etc/post-training/image.json; exit 5\n"
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command",
         "srun --environment=post-training.toml --pty bash", "/dev/null"],
        input=typed, cwd=job, env=srun.environment, capture_output=True, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert '"input_hash"' in done.stdout
    assert done.returncode == 5


def test_srun_wrong_digest_is_refused_before_anything_runs(srun, job):
    text = (job / "post-training.toml").read_text()
    digest = text.split('POST_TRAINING_IMAGE_SQSH_SHA256 = "')[1][:64]
    Path(job / "wrong.toml").write_text(
        text.replace(f'SHA256 = "{digest}"', f'SHA256 = "{"0" * 64}"')
    )
    done = srun("touch", "ran", environment_file="wrong.toml")
    assert done.returncode != 0
    assert f"sha256 is {digest}, the EDF pins {'0' * 64}" in done.stderr
    assert not (job / "ran").exists()


def test_srun_broken_edf_fails_at_once(srun, job):
    (job / "broken.toml").write_text('image = "/x.sqsh"\nworkdir = "${NO_SUCH_VARIABLE}"\n')
    done = srun("touch", "ran", environment_file="broken.toml")
    assert done.returncode != 0
    assert "workdir: undefined variable NO_SUCH_VARIABLE" in done.stderr
    assert not (job / "ran").exists()


def test_scancel_closes_the_record(srun, job):
    arguments = ["entrypoint", "sft", "sft.yaml", "run_dir=cancelled", "training.max_steps=5000"]
    process = subprocess.Popen(
        ["srun", "--environment=post-training.toml", "--job-name=to-cancel", *arguments],
        cwd=job, env=srun.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = job / "cancelled/metrics.jsonl"
    wait_until(lambda: metrics.exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    subprocess.run(["scancel", "--name=to-cancel"], env=srun.environment, check=True)
    assert process.wait(TIMEOUT_S) != 0
    # Slurm lets srun go before the task has ended.
    wait_until(lambda: not is_live(job / "cancelled"))
    record = read_record(job / "cancelled")
    assert (record["status"], record["reason"]) == ("interrupted", "stopped by SIGTERM")
