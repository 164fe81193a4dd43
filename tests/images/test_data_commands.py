"""`post-training data …` from the host, which has no training stack."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.image


def test_data_inspect_runs_itself_in_the_image(post_training, image_edf: Path, job: Path):
    words = ["data", "inspect", "sft.yaml", "--environment", image_edf, "--html", "page.html"]
    # What the host's Python should find is not for the image's.
    done = post_training(*words, cwd=job, PYTHONPATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "page.html\n"
    assert "&lt;|im_start|&gt;" in (job / "page.html").read_text()


def test_data_count_data_is_stdout_and_talk_is_stderr(post_training, image_edf: Path, job: Path):
    done = post_training("data", "count", "sft.yaml", "--json", "--environment", image_edf, cwd=job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sources"][0]["num_sequences"] == 40


def test_data_count_file_that_is_not_mounted_has_a_hint(
    post_training, image_edf: Path, job: Path, tmp_path: Path
):
    elsewhere = tmp_path / "sums.jsonl"
    elsewhere.write_bytes((job / "sums.jsonl").read_bytes())
    override = f"data.datasets[0].path={elsewhere}"
    done = post_training("data", "count", "sft.yaml", override, "--environment", image_edf, cwd=job)
    assert done.returncode == 2
    assert f"data.datasets[0].path: no such file or folder: {elsewhere}" in done.stderr
    assert "edf run --mount" in done.stderr
