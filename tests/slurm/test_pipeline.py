"""`post-training pipeline submit` on a real Slurm, in the built image."""

import json
import re
import shutil
from pathlib import Path

import pytest

from helpers.slurm_cluster import wait_until
from helpers.submitted_jobs import SubmittedJobs
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.image]

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
  short:
    stage: filter
    array: 2
    config:
      tokenizer: init/model
      data:
        chat_template: chatml
        datasets: [{path: "${stages.parts.dataset}/train.jsonl",
                    columns: {prompt: question, completion: answer}}]
      chunk_rows: 4
      max_sequence_length: 64
  held-out:
    stage: mix
    needs: [train]
    config: {data: {datasets: [{path: "${stages.parts.dataset}/eval.jsonl"}]}}
"""


class Pipeline(SubmittedJobs):
    def pipeline(self, verb: str, *words: str) -> str:
        environment = ["--environment=submitted.toml"] if verb == "submit" else []
        return self.post_training("pipeline", verb, "pipeline.yaml", *environment, *words)

    def status(self) -> dict[str, dict]:
        return {stage["name"]: stage for stage in json.loads(self.pipeline("status", "--json"))}


@pytest.fixture(scope="module")
def slurm(start_cluster, cli, image_edf, job) -> Pipeline:
    shutil.copy(image_edf, job / "submitted.toml")
    (job / "pipeline.yaml").write_text(PIPELINE)
    return Pipeline(start_cluster(cli), cli, job)


@pytest.fixture(scope="module")
def submitted(slurm, job):
    """The pipeline after all its jobs; the training was told of the wall time in the middle."""
    slurm.pipeline("submit", "stages.train.config.training.max_steps=15")
    queue = slurm.run("squeue", "--noheader", "--format=%j %E")
    slurm.queue = dict(line.split(maxsplit=1) for line in queue.splitlines())
    slurm.while_waiting = slurm.status()
    slurm.wait_for_steps(slurm.while_waiting["train"]["run_dir"])
    slurm.run("scancel", "--signal=USR1", slurm.while_waiting["train"]["job_ids"][0])
    slurm.wait()
    return slurm


def test_pipeline_in_slurm_shows_names_and_dependencies(submitted):
    names = ("parts", "train", "short", "held-out")
    assert set(submitted.queue) == {f"{name}-pipeline" for name in names}
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
        ("parts", "train", "short", "held-out"), "finished"
    )
    train = read_record(Path(states["train"]["run_dir"]))
    assert [attempt["reason"] for attempt in train["attempts"]] == ["stopped by SIGUSR1", None]
    after = read_record(Path(states["held-out"]["run_dir"]))["attempts"][0]
    assert after["started"] >= train["attempts"][-1]["ended"]


def test_pipeline_array_shares_the_chunks_and_the_job_after_it_merges(submitted):
    run_dir = Path(submitted.status()["short"]["run_dir"])
    merge, workers = submitted.status()["short"]["job_ids"]
    records = [read_record(run_dir / f"workers/{index}") for index in range(2)]
    assert [record["status"] for record in records] == ["finished", "finished"]
    assert sum(record["metrics"]["timing"]["num_chunks"] for record in records) == 9
    assert read_record(run_dir)["attempts"][0]["scheduler_job"] == f"{merge}.0"
    assert len((run_dir / "dataset/rows.jsonl").read_text().splitlines()) == 36
    for index in range(2):
        assert "chunks" in (run_dir / f"slurm/slurm-{workers}_{index}.out").read_text()


def test_pipeline_submitted_again_queues_nothing(submitted):
    submitted.pipeline("submit", "stages.train.config.training.max_steps=15")
    assert submitted.stderr.count("unchanged, and finished") == 4
    assert submitted.run("squeue", "--noheader") == ""


def test_pipeline_stage_that_fails_ends_those_behind_it(submitted, job):
    words = ("stages.train.config.model.path=init", "stages.parts.config.seed=9")
    submitted.pipeline("submit", *words)
    submitted.wait()
    states = submitted.status()
    assert states["parts"]["state"] == "finished"
    assert states["train"]["state"] in ("failed", "ended")
    assert (states["held-out"]["state"], states["held-out"]["reason"]) == (
        "not started", "needs train",
    )  # fmt: skip


SHARDS = """
run_dir: shards
stages:
  short:
    stage: filter
    array: 2
    config:
      tokenizer: init/model
      data:
        chat_template: chatml
        transforms: [held.py]
        datasets: [{path: sums.jsonl, columns: {prompt: question, completion: answer},
                    transform: held}]
      chunk_rows: 4
      max_sequence_length: 64
"""
# Nobody gets on before the file is there.
HELD = """
import time
from pathlib import Path
from post_training.data.transforms import register_transform

@register_transform("held")
def held(row):
    while not Path("GO").exists():
        time.sleep(0.01)
    return row
"""


@pytest.mark.long
def test_pipeline_array_killed_worker_is_tried_again_alone(slurm, job):
    (job / "shards.yaml").write_text(SHARDS)
    (job / "held.py").write_text(HELD.replace("GO", str(job / "go")))
    verb = ("pipeline", "submit", "shards.yaml", "--environment=submitted.toml")
    slurm.post_training(*verb)
    (told,) = json.loads(slurm.post_training("pipeline", "status", "shards.yaml", "--json"))
    run_dir, (merge, workers) = Path(told["run_dir"]), told["job_ids"]
    wait_until(lambda: all((run_dir / f"workers/{index}/run.json").exists() for index in range(2)))
    slurm.run("scancel", "--signal=KILL", f"{workers}_0.0")
    wait_until(lambda: (run_dir / "slurm/failures-0.json").exists())
    (job / "go").touch()
    assert slurm.wait(merge) == "COMPLETED", slurm.log(told["run_dir"], merge)
    restarts = [slurm.shown(f"{workers}_{index}")["Restarts"] for index in range(2)]
    assert restarts == ["1", "0"]
    attempts = [len(read_record(run_dir / f"workers/{index}")["attempts"]) for index in range(2)]
    assert attempts == [2, 1]
    assert len((run_dir / "dataset/rows.jsonl").read_text().splitlines()) == 40
