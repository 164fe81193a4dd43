"""An SFT run killed again and again ends in the bytes of the run that was not."""

import random
import shutil
import subprocess
import time

import pytest

from post_training.records.run_record import read_record

pytestmark = [pytest.mark.long, pytest.mark.image]
NUM_KILLS = 12


@pytest.mark.parametrize("num_processes", [1, 2])
def test_run_killed_at_random_moments_ends_in_the_same_bytes(cli, image_edf, job, num_processes):
    def command(run_dir: str) -> list[str]:
        return [
            str(cli), "edf", "run", str(image_edf), "--", "entrypoint", "sft", "sft.yaml",
            f"run_dir={run_dir}", "training.max_steps=200", "checkpointing.save_steps=7",
            f"num_processes={num_processes}",
        ]  # fmt: skip

    whole, killed = f"whole-{num_processes}", f"killed-{num_processes}"
    started = time.monotonic()
    subprocess.run(command(whole), cwd=job, check=True, capture_output=True)
    duration_s = time.monotonic() - started
    moments = random.Random(num_processes)
    num_killed = 0
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command(killed), cwd=job, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.2, 1.0) * duration_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            num_killed += 1
        if (job / killed / "run.json").exists() and read_record(job / killed)[
            "status"
        ] == "finished":
            break
    else:
        subprocess.run(command(killed), cwd=job, check=True, capture_output=True)
    assert num_killed >= 2
    assert read_record(job / killed)["outputs"] == read_record(job / whole)["outputs"]
    shutil.rmtree(job / killed)
