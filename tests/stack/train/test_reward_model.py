"""`entrypoint reward-model`: what it learns, and that a killed run ends in the same bytes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.annotation_stages import run_stage
from helpers.branch_rows import branch, data, prompt_row
from helpers.dpo_runs import preference_rows
from helpers.row_files import read_rows, write_rows
from helpers.sft_runs import changed, metrics, stable_files
from helpers.stage_process import rank_file, run_stage_on_ranks
from post_training.core.errors import PostTrainingError
from post_training.train.config import RewardModelConfig
from post_training.train.reward_model import pair_losses


@pytest.fixture(scope="module")
def config(dropout_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight steps of 4 × 2 pairs, checkpoints after 5 and 8; the model has dropout."""
    pairs = write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preference_rows(30))
    return {
        "model": {"path": str(dropout_model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(pairs)}]},
        "training": {
            "max_steps": 8,
            "effective_batch_size": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.001,
        },
        "checkpointing": {"save_steps": 5},
        "logging": {"logging_steps": 1},
        "num_threads": 1,
        "seed": 7,
    }


def run(config: dict[str, Any], run_dir: Path, **others: Any) -> list[int]:
    codes = run_stage_on_ranks("reward-model", config, run_dir, **others)
    error = rank_file(run_dir, 0, "error")
    assert not error.exists(), error.read_text()
    return codes


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run(config, run_dir) == [0]
    return run_dir


def test_pair_losses_equal_their_formula_in_float64():
    chosen, rejected = torch.tensor([0.5, -2.0, 30.0]), torch.tensor([0.25, 3.0, -30.0])
    for center in (0.0, 0.1):
        expected = [
            math.log1p(math.exp(-(c - r))) + center * (c + r) ** 2
            for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
        ]
        found = pair_losses(chosen, rejected, center).tolist()
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("point", ["between two micro-batches", "before the random state is saved"])
def test_reward_model_killed_and_resumed_ends_in_the_same_bytes(
    point: str, config: dict[str, Any], whole: Path, tmp_path: Path
):
    killed = tmp_path / "run"
    assert run(config, killed, kill_at=point) == [-9]
    assert not (killed / "model").exists()
    assert run(config, killed, resuming=True) == [0]
    assert stable_files(killed) == stable_files(whole)
    assert metrics(killed) == metrics(whole)


def test_reward_model_of_other_micro_batches_learns_the_same(config, model: Path, tmp_path: Path):
    config = changed(config, **{"model.path": str(model), "training.max_steps": 3})
    first = metrics_of(tmp_path / "one", config)
    micro = {"training.per_device_train_batch_size": 4}
    second = metrics_of(tmp_path / "two", changed(config, **micro))
    for one, two in zip(first, second, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    # A head with small weights can't tell answers apart yet.
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=0.1)


def metrics_of(run_dir: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    assert run(config, run_dir) == [0]
    return metrics(run_dir)


def test_reward_model_learns_which_answers_are_better_and_rewards_reads_it(
    config, model: Path, tmp_path: Path
):
    settings = {"model.path": str(model), "training.max_steps": 30, "logging.logging_steps": 10}
    run_stage("reward-model", changed(config, **settings, **{"training.learning_rate": 0.01}),
             tmp_path / "run")  # fmt: skip
    last = metrics(tmp_path / "run")[-1]
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 2
    folder = tmp_path / "run/model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    rows = [
        prompt_row(
            str(n),
            row["prompt"][-1]["content"],
            [branch(row[side][0]["content"]) for side in ("chosen", "rejected")],
        )
        for n, row in enumerate(preference_rows(30))
        if len(row["prompt"]) == 1
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    reward = {"name": "rm", "model": {"path": str(folder)}}
    run_stage("rewards", {"data": data(path), "rewards": [reward]}, tmp_path / "judged")
    judged = [
        [each["rewards"]["rm"] for each in row["conversation_branches"]]
        for row in read_rows(tmp_path / "judged")
    ]
    assert all(better > worse for better, worse in judged)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora": {}}, "a reward model is trained whole"),
        ({"pairs": {"share_prompt": True}}, "pairs.share_prompt: is for training a policy"),
        ({"distributed": {"strategy": "zero3"}}, "new output is not divided yet"),
    ],
)
def test_reward_model_settings_of_a_policy_are_refused(settings, problem, config):
    with pytest.raises(ValueError, match=problem):
        RewardModelConfig.model_validate({**config, **settings})


def test_reward_model_of_an_architecture_without_one_is_refused(config, init_model, tmp_path: Path):
    apertus = init_model(tmp_path / "apertus", architecture="apertus")
    with pytest.raises(PostTrainingError, match=r"can't be loaded.*ApertusConfig"):
        run_stage("reward-model", changed(config, **{"model.path": str(apertus)}), tmp_path / "run")
