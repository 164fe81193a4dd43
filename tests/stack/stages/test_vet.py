"""Two tasks on one node ask whether it is fit, as `submit --vet` starts them; gloo adds up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TASK = {
    "SLURMD_NODENAME": "nid001",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "nid001",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}


def vet(run_dir: Path, num_tasks: int = 2, **variables: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each task."""
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "post_training.stages.vet", str(run_dir)],
            env={
                **os.environ, **TASK, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                **variables,
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(num_tasks)
    ]  # fmt: skip
    said = [task.communicate() for task in tasks]
    return [(task.returncode, *texts) for task, texts in zip(tasks, said, strict=True)]


def test_vet_of_a_fit_node_says_so_of_every_task(tmp_path):
    assert [done[:2] for done in vet(tmp_path)] == [(0, "Vetted: nid001\n")] * 2


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, "the job has GPUs, and torch sees none"),
        ({}, "cannot be written"),
    ],
)
def test_vet_of_a_bad_node_names_it_and_why(tmp_path, variables, told):
    run_dir = tmp_path
    if not variables:
        run_dir = tmp_path / "file"
        run_dir.write_text("")
    for code, out, err in vet(run_dir, **variables):
        assert (code, out) == (1, "Cordon: nid001\n")
        assert told in err
