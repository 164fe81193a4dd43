"""Killed anywhere and started again, a preference run ends in the bytes of the one that was not."""

from pathlib import Path
from typing import Any

import pytest

from helpers.dpo_runs import preference_rows
from helpers.row_files import write_rows
from helpers.sft_runs import changed, metrics, stable_files
from helpers.stage_process import rank_file, run_stage_on_ranks


@pytest.fixture(scope="module")
def config(dropout_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twelve steps of 4 × 2 pairs, checkpoints after 5, 10 and 12; the model has dropout, and the
    reference none."""
    pairs = write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preference_rows(30))
    return {
        "model": {"path": str(dropout_model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(pairs)}]},
        "dpo": {"share_prompt": True},
        "loss": {"name": "qrpo", "beta": 0.1},
        "training": {
            "max_steps": 12,
            "effective_batch_size": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.001,
        },
        "checkpointing": {"save_steps": 5},
        "logging": {"logging_steps": 3},
        "num_threads": 1,
        "seed": 7,
    }


def run(config: dict[str, Any], run_dir: Path, **others: Any) -> list[int]:
    codes = run_stage_on_ranks("dpo", config, run_dir, **others)
    error = rank_file(run_dir, 0, "error")
    assert not error.exists(), error.read_text()
    return codes


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run(config, run_dir) == [0]
    return run_dir


@pytest.mark.parametrize(
    "point",
    [
        "while preparing pairs",
        "while computing the reference",
        "between two micro-batches",
        "before the random state is saved",
        "before the model is saved",
    ],
)
def test_dpo_killed_and_resumed_ends_in_the_same_bytes(
    point: str, config: dict[str, Any], whole: Path, tmp_path: Path
):
    killed = tmp_path / "run"
    assert run(config, killed, kill_at=point) == [-9]
    assert not (killed / "model").exists()
    assert run(config, killed, resuming=True) == [0]
    assert stable_files(killed) == stable_files(whole)
    assert metrics(killed) == metrics(whole)


def test_dpo_on_two_ranks_has_the_reference_and_the_batches_of_one(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    without_dropout = changed(config, **{"model.path": str(model), "training.max_steps": 6})
    assert run(without_dropout, tmp_path / "one") == [0]
    assert run(without_dropout, tmp_path / "two", world_size=2) == [0, 0]
    one, two = (stable_files(tmp_path / name) for name in ("one", "two"))
    assert one["reference/logprobs.npy"] == two["reference/logprobs.npy"]
    pairs = zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True)
    for line, other in pairs:
        assert line["num_tokens"] == other["num_tokens"]
        for name in ("loss", "grad_norm", "rewards/margins", "kl"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.long
def test_dpo_on_two_ranks_killed_while_saving_and_resumed_ends_in_the_same_bytes(
    config: dict[str, Any], tmp_path: Path
):
    zero = changed(config, distributed={"strategy": "zero2"})
    run(zero, tmp_path / "whole", world_size=2)
    point = "before the random state is saved"
    assert -9 in run_stage_on_ranks("dpo", zero, tmp_path / "killed", world_size=2, kill_at=point)
    for rank in (0, 1):
        rank_file(tmp_path / "killed", rank, "error").unlink(missing_ok=True)
    assert run(zero, tmp_path / "killed", world_size=2, resuming=True) == [0, 0]
    assert stable_files(tmp_path / "killed") == stable_files(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
