"""A run folder on a file system that becomes full in the middle of training."""

import json
import shutil
import subprocess

import pytest

from post_training.records.run_record import read_record

pytestmark = pytest.mark.image


@pytest.fixture(params=["600k", "900k"])
def small_disk(request, job, tmp_path):
    """The job's folder on a file system with room for the first checkpoint, or for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", folder], check=True
    )
    for name in ("sums.jsonl", "sft.yaml"):
        shutil.copy(job / name, folder)
    shutil.copytree(job / "init/model", folder / "init/model")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_one_clear_line_and_the_run_continues_with_room(inside, job, small_disk):
    arguments = ["entrypoint", "sft", "sft.yaml", "run_dir=run", "checkpointing.save_steps=2"]
    done = inside(*arguments, cwd=small_disk)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "run" in errors[0]
    assert "cannot write: " in errors[0]
    assert "MB are free there)" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (small_disk / "run/model").exists()
    assert not (small_disk / "run/checkpoints/.saving").exists()
    record = read_record(small_disk / "run")
    assert record["status"] == "failed"  # What was half-written has made room for it.
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    done = inside(*arguments, cwd=small_disk)
    assert done.returncode == 0, done.stderr
    record = read_record(small_disk / "run")
    assert len(record["attempts"]) == 2
    whole = json.loads((job / "run/run.json").read_text())["outputs"]["artifacts"]
    assert record["outputs"]["artifacts"] == whole
