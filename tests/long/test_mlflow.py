"""`post-training runs sync --to mlflow` with MLflow's own client, which is in no image of ours: in
a virtual environment, with a folder in the place of a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ended_runs import LINES, ended_run, training_line

REPOSITORY = Path(__file__).parents[2]
# Beside what the command line needs.
CLIENT = "mlflow-skinny==3.17.2"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = tmp_path_factory.mktemp("mlflow") / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    lines = (REPOSITORY / "pyproject.toml").read_text().split("dependencies = [", 1)[1]
    needed = [line.strip(' ",') for line in lines.split("]", 1)[0].splitlines() if "==" in line]
    install = [environment / "bin/python", "-m", "pip", "install", "--quiet", CLIENT, *needed]
    subprocess.run(install, check=True)
    return environment / "bin/python"


@pytest.mark.long
def test_run_in_mlflow_is_one_with_what_is_new_of_it(python: Path, tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    one = ended_run(tmp_path / "one", tmp_path / "base", num_attempts=2, lines=LINES[:2])
    uri = f"file:{tmp_path / 'mlruns'}"

    def sync(**env: str) -> subprocess.CompletedProcess[str]:
        words = [python, "-m", "post_training.cli", "runs", "sync", one, "--to", "mlflow"]
        own = {"PYTHONPATH": str(REPOSITORY / "src"), "MLFLOW_ALLOW_FILE_STORE": "true", **env}
        plain = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
        return subprocess.run(words, env=plain | own, cwd=tmp_path, capture_output=True, text=True)

    nowhere = sync()
    assert nowhere.returncode == 2
    assert "MLFLOW_TRACKING_URI is not set" in nowhere.stderr
    first = sync(MLFLOW_TRACKING_URI=uri)
    assert first.returncode == 0, first.stderr
    with open(one / "metrics.jsonl", "a") as file:
        file.write(json.dumps(training_line(6, 1.25)) + "\n")
    second = sync(MLFLOW_TRACKING_URI=uri)
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
    own = second.stdout.split()[-1]
    [folder] = (tmp_path / "mlruns").glob(f"*/{own}")
    points = [line.split()[1:] for line in (folder / "metrics/train/loss").read_text().splitlines()]
    assert points == [["2.0", "2"], ["1.25", "6"]]
    assert (folder / "metrics/eval/loss").read_text().split()[1:] == ["2.5", "2"]
    assert (folder / "params/training.learning_rate").read_text() == "0.001"
    assert (folder / "tags/post_training.attempts").read_text() == "2"
    assert (folder / "artifacts/run.json").read_bytes() == (one / "run.json").read_bytes()
