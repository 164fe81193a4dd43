"""`post-training runs sync`: what W&B and TensorBoard have of a run that has ended, read back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ended_runs import LINES, ended_run, training_line
from helpers.wandb_files import offline_folders, wandb_config, wandb_rows, wandb_summary

VERDICT = {"verdict": "identical", "path": "", "machine_differences": []}


def sync(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "post_training.cli", "runs", "sync", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/one, started three times and reproduced; runs/two, of its model, which failed."""
    folder = tmp_path_factory.mktemp("sync")
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text("{}")
    own = {"logging.wandb_project": "mine", "logging.wandb_group": None}
    one = ended_run(folder / "runs/one", folder / "base", num_attempts=3, placement=own)
    ended_run(folder / "runs/two", one / "model", status="failed")
    again = folder / "runs/one-reproduced-1"
    again.mkdir()
    said = {"reproduces": run_id(one), **VERDICT}
    (again / "reproduction.json").write_text(json.dumps(said))
    return folder


def run_id(run_dir: Path) -> str:
    return json.loads((run_dir / "run.json").read_text())["run_id"]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_API_KEY_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_run_in_wandb_is_one_however_often_it_was_started_and_is_synced(runs: Path):
    for _ in range(2):
        done = sync(runs, "runs/one", "runs/two", "--to", "wandb")
        assert done.returncode == 0, done.stderr
    one, two = (run_id(runs / "runs" / name) for name in ("one", "two"))
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [one, two]
    assert f"{one}: offline, for `wandb sync" in done.stdout
    [folder] = offline_folders(runs / "synced" / one)
    rows = wandb_rows(folder, one)
    assert set(rows) == {2, 4}
    assert rows[2]["train/loss"] == 2.0
    assert rows[2]["eval/loss"] == 2.5
    assert rows[4]["train/loss"] == 1.5
    config = wandb_config(folder, one)
    assert config["training.learning_rate"] == 1e-3
    assert config["post_training"]["attempts"] == 3
    assert config["post_training"]["verdicts"] == ["run again in one-reproduced-1: identical"]
    assert wandb_summary(folder, one)["final/loss"] == 1.5
    [folder] = offline_folders(runs / "synced" / two)
    made_by = wandb_config(folder, two)["post_training"]["inputs"]["model.path"]["made_by"]
    assert made_by["run_id"] == one


def test_run_in_tensorboard_has_its_lines_settings_and_lineage_once(runs: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        done = sync(runs, "runs/two", "--to", "tensorboard", "-o", "boards")
        assert done.returncode == 0, done.stderr
    two = run_id(runs / "runs/two")
    assert done.stdout == f"{two}: tensorboard --logdir boards\n"
    found = EventAccumulator(str(runs / "boards" / two)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(2, 2.0), (4, 1.5)]
    assert [(e.step, e.value) for e in found.Scalars("final/timing/wall_s")] == [(4, 3.0)]
    [text] = [event.tensor_proto.string_val[0] for event in found.Tensors("run")]
    assert json.loads(text)["inputs"]["model.path"]["made_by"]["run_id"] == run_id(
        runs / "runs/one"
    )


def test_what_can_t_be_shown_is_told_before_anything_is(runs: Path, tmp_path: Path):
    ended_run(tmp_path / "lines", runs / "base")
    (tmp_path / "lines/metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n{")
    (tmp_path / "none").mkdir()
    good = str(runs / "runs/one")
    for arguments, problem in (
        ([good, "none"], "no run here: there is no run.json"),
        ([good, "lines"], "a line is no JSON"),
        ([good, "--project", "p"], "--project: TensorBoard has no projects"),
    ):
        done = sync(tmp_path, *arguments, "--to", "tensorboard")
        assert (done.returncode, problem in done.stderr) == (2, True), done.stderr
    done = sync(tmp_path, good, "--to", "comet")
    assert "--to: must be one of wandb, mlflow, tensorboard (got comet)" in done.stderr
    done = sync(tmp_path, good, "--to", "mlflow")
    assert "--to mlflow: the package mlflow is not installed here" in done.stderr
    assert not (tmp_path / "synced").exists()


def test_live_run_is_refused(runs: Path, tmp_path: Path):
    from post_training.records.run import RunFolder

    run_dir = ended_run(tmp_path / "live", runs / "base", status="interrupted")
    folder = RunFolder(run_dir)
    folder.claim()
    done = sync(tmp_path, "live", "--to", "tensorboard")
    folder._lock.close()
    assert (done.returncode, "the run is live" in done.stderr) == (2, True)


def test_lines_without_a_record_of_figures_are_shown(runs: Path, tmp_path: Path):
    """A stage that does not train has figures alone; one that was killed has lines alone."""
    ended_run(tmp_path / "one", runs / "base", lines=[])
    ended_run(tmp_path / "two", runs / "base", lines=[training_line(1, 3.0)], status="failed")
    done = sync(tmp_path, "one", "two", "--to", "tensorboard")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr
