"""A run that is asked to end writes a checkpoint first, and goes on from it to the same bytes."""

import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, metrics, stable_files
from helpers.stage_process import rank_file, run_sft_on_ranks


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_sft_on_ranks(config, run_dir) == [0]
    return run_dir


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_in_a_step_leaves_a_checkpoint_of_that_step(
    number: signal.Signals, config: dict[str, Any], whole: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    # After the 15th of the micro-batches, of which a step has four.
    point = "between two micro-batches"
    assert run_sft_on_ranks(config, run_dir, kill_at=point, kill_with=number) == [1]
    assert f"Interrupted: stopped by {number.name}" in rank_file(run_dir, 0, "error").read_text()
    assert checkpoints(run_dir) == ["checkpoint-4"]
    assert not (run_dir / "model").exists()
    assert run_sft_on_ranks(config, run_dir, resuming=True) == [0]
    assert stable_files(run_dir) == stable_files(whole)
    assert metrics(run_dir) == metrics(whole)


def test_signal_to_one_of_two_ranks_ends_both_in_the_same_step(
    config: dict[str, Any], tmp_path: Path
):
    run_sft_on_ranks(config, tmp_path / "whole", world_size=2)
    run_dir = tmp_path / "run"
    settings = {"kill_at": "between two micro-batches", "kill_with": signal.SIGUSR1}
    assert run_sft_on_ranks(config, run_dir, world_size=2, kill_ranks=(1,), **settings) == [1, 1]
    # A step has two micro-batches on each rank.
    assert checkpoints(run_dir) == ["checkpoint-5", "checkpoint-8"]
    assert run_sft_on_ranks(config, run_dir, world_size=2, resuming=True) == [0, 0]
    assert stable_files(run_dir) == stable_files(tmp_path / "whole")


def test_signal_in_the_last_step_lets_the_run_finish(
    config: dict[str, Any], whole: Path, tmp_path: Path
):
    short = changed(config, **{"training.max_steps": 4})
    point = "between two micro-batches"
    codes = run_sft_on_ranks(short, tmp_path / "run", kill_at=point, kill_with=signal.SIGTERM)
    assert codes == [0]
    assert (tmp_path / "run" / "model").exists()
