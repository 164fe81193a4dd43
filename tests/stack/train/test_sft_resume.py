"""Killed anywhere and started again, a run ends in the bytes of the run that was not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import KILL_POINTS, rank_file, run_sft_on_ranks
from post_training.core.errors import UsageError
from post_training.core.hashing import hash_files


@pytest.fixture(scope="module")
def config(config: dict[str, Any]) -> dict[str, Any]:
    """With an evaluation and a model for inference in each fourth step and at the end."""
    evaluation = {"datasets": config["data"]["datasets"], "debug_subsample": 9, "eval_steps": 4}
    settings = {"checkpointing.inference_checkpoint_steps": 4}
    return changed(config, evaluation={**evaluation, "per_device_eval_batch_size": 4}, **settings)


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_sft_on_ranks(config, run_dir) == [0]
    return run_dir


@pytest.mark.parametrize("point", KILL_POINTS)
def test_sft_killed_and_resumed_ends_in_the_same_bytes(
    point: str, config: dict[str, Any], whole: Path, tmp_path: Path
):
    killed = tmp_path / "run"
    assert run_sft_on_ranks(config, killed, kill_at=point) == [-9]
    assert not (killed / "model").exists()
    assert run_sft_on_ranks(config, killed, resuming=True) == [0]
    assert stable_files(killed) == stable_files(whole)
    assert metrics(killed) == metrics(whole)


def test_sft_killed_in_mixed_precision_and_resumed_ends_in_the_same_bytes(
    config: dict[str, Any], tmp_path: Path
):
    settings = {"training.mixed_precision": "bf16", "training.gradient_checkpointing": True}
    mixed = changed(config, **settings)
    run_sft_on_ranks(mixed, tmp_path / "whole")
    run_sft_on_ranks(mixed, tmp_path / "killed", kill_at="before the random state is saved")
    assert run_sft_on_ranks(mixed, tmp_path / "killed", resuming=True) == [0]
    assert stable_files(tmp_path / "killed") == stable_files(tmp_path / "whole")
    assert stable_files(tmp_path / "killed")


def test_sft_resumed_among_incomplete_checkpoints_uses_the_newest_complete_one(
    config: dict[str, Any], whole: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    run_sft_on_ranks(config, run_dir, kill_at="before the random state is saved")
    for name in ("checkpoint-11", ".saving/checkpoint-10"):
        (run_dir / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoints" / name / "half_written.pt").write_bytes(b"half")
    sft(config, run_dir, resuming=True)
    assert stable_files(run_dir) == stable_files(whole)


def test_sft_two_ranks_killed_while_saving_and_resumed_end_in_the_same_bytes(
    config: dict[str, Any], tmp_path: Path
):
    run_sft_on_ranks(config, tmp_path / "whole", world_size=2)
    point = "before the random state is saved"
    assert -9 in run_sft_on_ranks(config, tmp_path / "killed", world_size=2, kill_at=point)
    assert run_sft_on_ranks(config, tmp_path / "killed", world_size=2, resuming=True) == [0, 0]
    assert stable_files(tmp_path / "killed") == stable_files(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_sft_checkpoint_that_one_of_two_ranks_has_not_written_is_not_complete(
    config: dict[str, Any], tmp_path: Path
):
    point = "before the random state is saved"
    codes = run_sft_on_ranks(config, tmp_path / "run", world_size=2, kill_at=point, kill_ranks=(1,))
    assert codes == [1, -9]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-5"
    ]


def test_sft_killed_on_two_ranks_can_be_resumed_on_one(config: dict[str, Any], tmp_path: Path):
    point = "before the random state is saved"
    run_sft_on_ranks(config, tmp_path / "run", world_size=2, kill_at=point)
    sft(config, tmp_path / "run", resuming=True)
    run_sft_on_ranks(config, tmp_path / "whole", world_size=2)
    # The bits may differ, the rows may not.
    resumed, whole = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [line.get("num_tokens") for line in resumed] == [
        line.get("num_tokens") for line in whole
    ]


def test_sft_checkpoint_without_room_leaves_nothing_and_is_written_later(
    config: dict[str, Any], whole: Path, tmp_path: Path
):
    """Left there, it would keep the disk full, and the record of the run could not be closed."""
    run_dir = tmp_path / "run"
    size = (whole / "model/model.safetensors").stat().st_size
    plain = changed(config, **{"checkpointing.inference_checkpoint_steps": None})
    assert run_sft_on_ranks(plain, run_dir, max_file_bytes=size // 2) == [1]
    assert "checkpoints: cannot write: " in rank_file(run_dir, 0, "error").read_text()
    assert not (run_dir / "checkpoints/.saving").exists()
    assert run_sft_on_ranks(plain, run_dir, resuming=True) == [0]
    assert hash_files(run_dir / "model") == hash_files(whole / "model")


def test_sft_resumed_with_a_half_written_last_metrics_line_rewrites_it(
    config: dict[str, Any], whole: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    run_sft_on_ranks(config, run_dir, kill_at="before the random state is saved")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "epo')
    sft(config, run_dir, resuming=True)
    assert metrics(run_dir) == metrics(whole)


def test_sft_resumed_after_its_last_step_only_saves_the_model_again(
    config: dict[str, Any], tmp_path: Path
):
    first = sft(config, tmp_path / "run")
    before = stable_files(tmp_path / "run")
    again = sft(config, tmp_path / "run", resuming=True)
    del first.metrics["timing"], again.metrics["timing"]
    assert again == first
    assert stable_files(tmp_path / "run") == before


def test_sft_resumed_with_another_logging_interval_continues_from_the_checkpoint(
    config: dict[str, Any], tmp_path: Path
):
    run_dir = tmp_path / "run"
    run_sft_on_ranks(config, run_dir, kill_at="before the random state is saved")
    sft(changed(config, **{"logging.logging_steps": 2}), run_dir, resuming=True)
    lines = [line["step"] for line in metrics(run_dir) if "eval" not in line]
    assert lines == [3, 6, 8, 10, 12]


def test_sft_whose_newest_checkpoint_was_taken_away_is_not_begun_again(
    config: dict[str, Any], tmp_path: Path
):
    run_dir = tmp_path / "run"
    run_sft_on_ranks(config, run_dir, kill_at="before the random state is saved")
    taken = run_dir / "checkpoints" / "checkpoint-5"
    shutil.move(taken, tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="the newest checkpoint is checkpoint-5, and it is miss"):
        sft(config, run_dir, resuming=True)
    assert [line["step"] for line in metrics(run_dir)][:2] == [3, 4]
    shutil.move(tmp_path / "elsewhere", taken)
    shutil.move(run_dir / "checkpoints", tmp_path / "all")
    with pytest.raises(UsageError, match="10 steps were made, and there is no checkpoint of any"):
        sft(config, run_dir, resuming=True)
    shutil.move(tmp_path / "all", run_dir / "checkpoints")
    sft(config, run_dir, resuming=True)
