"""An SFT run killed again and again ends in the bytes of the run that was not."""

import random
import subprocess
import time

import pytest

from post_training.records.run_record import read_record

pytestmark = [pytest.mark.long, pytest.mark.image]
NUM_KILLS = 7


@pytest.mark.parametrize("num_processes", [1, 2])
def test_run_killed_at_random_moments_ends_in_the_same_bytes(cli, image_edf, job, num_processes):
    def command(run_dir: str) -> list[str]:
        return [
            str(cli), "edf", "run", str(image_edf), "--", "entrypoint", "sft", "sft.yaml",
            f"run_dir={run_dir}", "training.max_steps=600", "checkpointing.save_steps=7",
            f"num_processes={num_processes}",
        ]  # fmt: skip

    def num_steps() -> int:
        metrics = job / killed / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    whole, killed = f"whole-{num_processes}", f"killed-{num_processes}"
    subprocess.run(command(whole), cwd=job, check=True, capture_output=True)
    moments = random.Random(num_processes)
    for kill in range(NUM_KILLS):
        process = subprocess.Popen(command(killed), cwd=job, stderr=subprocess.DEVNULL)
        if kill == 0:
            time.sleep(moments.uniform(0, 5))  # Before or while the run is opened.
        else:
            # Some steps on, and then anywhere in a step or a save.
            goal = num_steps() + moments.randint(10, 100)
            while num_steps() < goal:
                assert process.poll() is None
            time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait()
    assert num_steps() < 600
    subprocess.run(command(killed), cwd=job, check=True, capture_output=True)
    record = read_record(job / killed)
    assert record["outputs"] == read_record(job / whole)["outputs"]
    assert len(record["attempts"]) >= NUM_KILLS
