"""`post-training pipeline submit` on a real Slurm, in the built image."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import wait_until

from post_training.records.run_record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image]

TIMEOUT_S = 180
PIPELINE = """
run_dir: pipeline
stages:
  parts:
    stage: split
    config: {data: {datasets: [{path: sums.jsonl}]}, eval_size: 4}
  train:
    stage: sft
    config:
      extends: [sft.yaml]
      data: {datasets: [{path: "${stages.parts.dataset}/train.jsonl",
                         columns: {prompt: question, completion: answer}}]}
  held-out:
    stage: mix
    needs: [train]
    config: {data: {datasets: [{path: "${stages.parts.dataset}/eval.jsonl"}]}}
"""


@pytest.fixture(scope="module")
def slurm(start_cluster, cli, image_edf, job):
    """The job's folder and a cluster: slurm("pipeline", "submit", …), slurm.wait()."""
    environment = {**os.environ, "SLURM_CONF": str(start_cluster(cli))}
    shutil.copy(image_edf, job / "pipeline.toml")
    (job / "pipeline.yaml").write_text(PIPELINE)

    def run(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            argv, cwd=job, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    def pipeline(verb: str, *words: str, check: bool = True):
        environment = ["--environment=pipeline.toml"] if verb == "submit" else []
        return run(str(cli), "pipeline", verb, "pipeline.yaml", *environment, *words, check=check)

    def wait() -> None:
        queue = ("squeue", "--noheader", "--format=%A")
        wait_until(lambda: run(*queue).stdout.split() == [], TIMEOUT_S)

    def status(*words: str) -> dict[str, dict]:
        shown = json.loads(pipeline("status", "--json", *words).stdout)
        return {stage["name"]: stage for stage in shown}

    pipeline.run, pipeline.wait, pipeline.status = run, wait, status
    return pipeline


@pytest.fixture(scope="module")
def submitted(slurm, job):
    """The pipeline after all its jobs; the training was told of the wall time in the middle."""
    slurm("submit", "stages.train.config.training.max_steps=15")
    queue = slurm.run("squeue", "--noheader", "--format=%j %E").stdout
    slurm.queue = dict(line.split(maxsplit=1) for line in queue.splitlines())
    slurm.while_waiting = slurm.status()
    metrics = Path(slurm.while_waiting["train"]["run_dir"], "metrics.jsonl")
    wait_until(lambda: metrics.exists() and metrics.read_text() != "", TIMEOUT_S)
    slurm.run("scancel", "--signal=USR1", slurm.while_waiting["train"]["job_ids"][0])
    slurm.wait()
    return slurm


def test_pipeline_in_slurm_shows_names_and_dependencies(submitted):
    assert set(submitted.queue) == {"parts-pipeline", "train-pipeline", "held-out-pipeline"}
    ids = {name: stage["job_ids"][0] for name, stage in submitted.while_waiting.items()}
    assert submitted.queue["train-pipeline"] == f"afterok:{ids['parts']}(unfulfilled)"
    assert set(re.findall(r"afterok:(\d+)", submitted.queue["held-out-pipeline"])) <= {
        ids["parts"], ids["train"],
    }  # fmt: skip
    assert submitted.while_waiting["train"]["state"] == "waiting"
    assert submitted.while_waiting["held-out"]["reason"].endswith("train")


def test_pipeline_in_slurm_a_requeued_stage_is_waited_for(submitted):
    states = submitted.status()
    assert {name: stage["state"] for name, stage in states.items()} == dict.fromkeys(
        ("parts", "train", "held-out"), "finished"
    )
    train = read_record(Path(states["train"]["run_dir"]))
    assert [attempt["reason"] for attempt in train["attempts"]] == ["stopped by SIGUSR1", None]
    after = read_record(Path(states["held-out"]["run_dir"]))["attempts"][0]
    assert after["started"] >= train["attempts"][-1]["ended"]


def test_pipeline_submitted_again_queues_nothing(submitted):
    again = submitted("submit", "stages.train.config.training.max_steps=15")
    assert again.stderr.count("unchanged, and finished") == 3
    assert submitted.run("squeue", "--noheader").stdout == ""


def test_pipeline_stage_that_fails_ends_those_behind_it(submitted, job):
    words = ("stages.train.config.model.path=init", "stages.parts.config.seed=9")
    submitted("submit", *words)
    submitted.wait()
    states = submitted.status()
    assert states["parts"]["state"] == "finished"
    assert states["train"]["state"] in ("failed", "ended")
    assert (states["held-out"]["state"], states["held-out"]["reason"]) == (
        "not started", "needs train",
    )  # fmt: skip
