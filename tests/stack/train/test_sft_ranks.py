"""Two gloo ranks share a batch: the same rows, one model."""

from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import rank_file, run_sft_on_ranks


@pytest.fixture(scope="module")
def two_ranks(
    config: dict[str, Any], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("ranks") / "run"
    assert run_sft_on_ranks(
        changed(config, **{"model.path": str(model)}), run_dir, world_size=2
    ) == [0, 0]
    return run_dir


def test_sft_two_ranks_end_with_one_model(two_ranks: Path):
    one, other = (rank_file(two_ranks, rank, "weights").read_text() for rank in (0, 1))
    assert one == other


def test_sft_two_ranks_see_the_batches_of_one_rank(
    two_ranks: Path, config: dict[str, Any], model: Path, tmp_path: Path
):
    sft(changed(config, **{"model.path": str(model)}), tmp_path / "run")
    for one, two in zip(metrics(tmp_path / "run"), metrics(two_ranks), strict=True):
        for exact in ("step", "epoch", "num_tokens", "num_trained_tokens", "learning_rate"):
            assert one[exact] == two[exact]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_sft_two_ranks_twice_give_the_same_bytes(
    two_ranks: Path, config: dict[str, Any], model: Path, tmp_path: Path
):
    run_sft_on_ranks(
        changed(config, **{"model.path": str(model)}), tmp_path / "again", world_size=2
    )
    assert stable_files(tmp_path / "again") == stable_files(two_ranks)


def test_sft_bad_row_on_two_ranks_stops_both(config: dict[str, Any], tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": null}\n')
    columns = {"prompt": "question", "completion": "answer"}
    bad = changed(config, **{"data.datasets": [{"path": str(path), "columns": columns}]})
    assert run_sft_on_ranks(bad, tmp_path / "run", world_size=2) == [1, 1]
    problem = f"{path}:1: answer: must be a string (got null)"
    assert problem in rank_file(tmp_path / "run", 0, "error").read_text()
    assert f"rank 0 failed: {problem}" in rank_file(tmp_path / "run", 1, "error").read_text()


def test_sft_batch_that_two_ranks_cannot_share_is_refused(config: dict[str, Any], tmp_path: Path):
    odd = changed(
        config,
        **{"training.effective_batch_size": 9, "training.per_device_train_batch_size": 3},
    )
    assert run_sft_on_ranks(odd, tmp_path / "run", world_size=2) == [1, 1]
    error = rank_file(tmp_path / "run", 0, "error").read_text()
    assert (
        "effective_batch_size must be a multiple of per_device_train_batch_size × processes "
        "= 3 × 2 (got 9; nearest: 6 or 12)" in error
    )
