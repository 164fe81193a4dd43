"""The stage as a command: workers with records of their own, signals, and the run's record."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.row_files import read_rows
from helpers.stage_process import start_entrypoint
from post_training.records.run_record import read_record


@pytest.fixture
def config_file(model: Path, dataset: Path, tmp_path: Path) -> Path:
    config = {
        "model": {"path": str(model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(dataset)}]},
        "sampling": {"n": 2, "max_tokens": 20},
        "chunk_rows": 4,
        "num_threads": 1,
        "num_processes": 1,
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "generate.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def start(config_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """start(key=value…): a process of the stage, which says what it does in tmp_path/log."""

    def start(*overrides: str, kill: tuple | None = None) -> Any:
        command = ["generate", str(config_file), *overrides, "--unpinned"]
        return start_entrypoint(command, tmp_path / "log", kill)

    return start


@pytest.fixture
def run(start: Callable[..., Any], tmp_path: Path) -> Callable[..., int]:
    """The exit code of such a process."""

    def run(*overrides: str) -> int:
        process = start(*overrides)
        process.join(120)
        return process.exitcode

    return run


def test_workers_have_records_of_their_own_and_the_run_puts_together(start, run, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    workers = [start(f"workers={{index: {i}, count: 2}}") for i in range(2)]
    for worker in workers:
        worker.join(120)
    records = [read_record(run_dir / "workers" / str(i)) for i in range(2)]
    assert [record["status"] for record in records] == ["finished"] * 2, log.read_text()
    assert sum(record["metrics"]["timing"]["num_chunks"] for record in records) == 13
    assert not (run_dir / "run.json").exists()
    # A worker that comes back finds nothing to do, and says so.
    assert run("workers={index: 1, count: 2}") == 0
    assert "did 0 of 13 chunks" in log.read_text()
    assert run() == 0
    assert "50 rows with 150 branches" in log.read_text()
    record = read_record(run_dir)
    assert record["status"] == "finished"
    assert "world_size" not in record["topology"]
    artifact = json.loads((run_dir / "dataset/artifact.json").read_text())
    assert artifact["kind"] == "dataset"
    assert artifact["made_by"]["inputs"].keys() == {"model.path", "data.datasets[0].path"}
    assert run() == 2
    assert "this run is finished" in log.read_text()


def test_signal_ends_the_run_at_once_and_the_next_goes_on(start, run, tmp_path):
    run_dir = tmp_path / "run"
    assert run(f"run_dir={tmp_path / 'whole'}") == 0
    in_the_third = ("annotate.work", "_Attempt", "annotate", 3, "after", signal.SIGUSR1)
    process = start(kill=in_the_third)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert read_record(run_dir)["status"] == "interrupted"
    assert not (run_dir / "dataset").exists()
    assert len(list((run_dir / "chunks").glob("0*.json"))) == 2
    assert run() == 0
    assert read_rows(run_dir) == read_rows(tmp_path / "whole")


@pytest.mark.long
def test_ranks_that_a_launcher_starts_are_workers(run, tmp_path):
    assert run() == 0
    assert run("num_processes=2", f"run_dir={tmp_path / 'ranks'}") == 0
    assert read_rows(tmp_path / "ranks") == read_rows(tmp_path / "run")
