"""An SFT run killed again and again ends in the bytes of the run that was not."""

import json
import random
import shutil
import subprocess
import time

import pytest

from helpers.kept_bytes import kept_bytes
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.long, pytest.mark.image]
NUM_KILLS, NUM_STEPS = 7, 200


@pytest.fixture(scope="module")
def dropout_model(job) -> str:
    """The model of `job` with dropout, so that a random state that isn't restored shows."""
    folder = job / "dropout"
    # A changed artifact is refused: these are files of our own.
    shutil.copytree(job / "init/model", folder, ignore=shutil.ignore_patterns("artifact.json"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    return str(folder)


@pytest.mark.parametrize(
    ("num_processes", "packing", "strategy"),
    [(1, "none", "ddp"), (1, "bfd", "ddp"), (2, "none", "ddp"), (2, "bfd", "zero2")],
)
def test_run_killed_at_random_moments_ends_in_the_same_bytes(
    cli, image_edf, job, dropout_model, num_processes, packing, strategy
):
    def command(run_dir: str) -> list[str]:
        return [
            str(cli), "edf", "run", str(image_edf), "--", "entrypoint", "sft", "sft.yaml",
            f"run_dir={run_dir}", f"model.path={dropout_model}", f"training.max_steps={NUM_STEPS}",
            "training.per_device_train_batch_size=1", "checkpointing.save_steps=7",
            f"sft.packing={packing}", f"num_processes={num_processes}",
            f"distributed.strategy={strategy}", "evaluation.eval_steps=11",
            "evaluation.datasets=[{path: sums.jsonl}]", "evaluation.debug_subsample=5",
            "checkpointing.inference_checkpoint_steps=13",
        ]  # fmt: skip

    def num_steps() -> int:
        metrics = job / killed / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    name = f"{num_processes}-{packing}"
    whole, killed = f"whole-{name}", f"killed-{name}"
    subprocess.run(command(whole), cwd=job, check=True, capture_output=True)
    moments = random.Random(name)
    for kill in range(NUM_KILLS):
        process = subprocess.Popen(command(killed), cwd=job, stderr=subprocess.DEVNULL)
        if kill == 0:
            time.sleep(moments.uniform(0, 5))  # Before or while the run is opened.
        else:
            # Some steps on, and then anywhere in a step, a save or an evaluation.
            goal = num_steps() + moments.randint(5, 30)
            while num_steps() < goal:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait()
    assert num_steps() < NUM_STEPS
    subprocess.run(command(killed), cwd=job, check=True, capture_output=True)
    record = read_record(job / killed)
    assert kept_bytes(record) == kept_bytes(read_record(job / whole))
    assert len(record["attempts"]) >= NUM_KILLS
