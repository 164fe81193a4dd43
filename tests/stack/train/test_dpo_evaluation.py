"""The evaluation's figures against the formula in float64, and that training does not notice it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.dpo_runs import dpo, preference_rows
from helpers.row_files import write_rows
from helpers.sft_runs import changed, metrics, stable_files
from helpers.stage_process import run_stage_on_ranks
from post_training.core.errors import PostTrainingError
from post_training.data.pairs.dataset import PairDataset
from post_training.data.rows import COMPLETION

BETA = 0.3


@pytest.fixture(scope="module")
def config(dropout_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps, an evaluation after every second, over 11 pairs in batches of 4."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = preference_rows(31)
    held_out = write_rows(folder / "held-out.jsonl", rows[20:])
    return {
        "model": {"path": str(dropout_model)},
        "data": {
            "chat_template": "chatml",
            "datasets": [{"path": str(write_rows(folder / "pairs.jsonl", rows[:20]))}],
        },
        "dpo": {},
        "loss": {"name": "dpo", "beta": BETA},
        "training": {"max_steps": 6, "effective_batch_size": 4, "learning_rate": 0.01},
        "evaluation": {
            "datasets": [{"path": str(held_out)}],
            "eval_steps": 2,
            "per_device_eval_batch_size": 4,
        },
        "logging": {"logging_steps": 3},
        "num_threads": 1,
        "seed": 7,
    }


def evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["eval"] for line in metrics(run_dir) if "eval" in line}


def expected(run_dir: Path, config: dict[str, Any]) -> dict[str, float]:
    """Of the final model and of the one it started from, in float64, one answer after another."""
    dataset = PairDataset.open(run_dir / "evaluation")
    assert dataset.num_pairs == 11
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        for path in (run_dir / "model", config["model"]["path"])
    )
    rewards = []
    for number in range(dataset.num_pairs):
        pair = dataset.read_pair(number)
        for answer in (pair.chosen, pair.rejected):
            ids = np.concatenate([pair.prefix, answer.ids]).astype(int)
            places = [len(pair.prefix) + n for n, k in enumerate(answer.kinds) if k == COMPLETION]
            with torch.no_grad():
                ours, theirs = (
                    each(torch.tensor(ids[None])).logits[0].log_softmax(-1)
                    for each in (policy, reference)
                )
            ratio = sum(float((ours - theirs)[place - 1, ids[place]]) for place in places)
            rewards.append(BETA * ratio)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = [one - other for one, other in zip(chosen, rejected, strict=True)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "loss": mean([math.log1p(math.exp(-margin)) for margin in margins]),
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([float(margin > 0) for margin in margins]),
    }


@pytest.fixture(scope="module")
def evaluated(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    result = dpo(config, run_dir)
    last = evaluations(run_dir)[6]
    assert result.metrics["eval_rewards/margins"] == last["rewards/margins"]
    return run_dir


def test_evaluation_has_the_figures_of_the_formula(config: dict[str, Any], evaluated: Path):
    found = evaluations(evaluated)
    assert list(found) == [2, 4, 6]
    for name, value in expected(evaluated, config).items():
        assert found[6][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found[6]["rewards/margins"] > found[2]["rewards/margins"] > 0


def test_evaluation_on_two_ranks_has_the_figures_of_the_formula(
    config: dict[str, Any], tmp_path: Path
):
    # 11 pairs in batches of 4: the second rank has one batch fewer that counts.
    assert run_stage_on_ranks("dpo", config, tmp_path / "run", world_size=2) == [0, 0]
    found = evaluations(tmp_path / "run")[6]
    for name, value in expected(tmp_path / "run", config).items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_evaluation_changes_no_bit_of_the_training(
    config: dict[str, Any], evaluated: Path, tmp_path: Path
):
    dpo({key: value for key, value in config.items() if key != "evaluation"}, tmp_path / "run")
    found = {
        name: digest
        for name, digest in stable_files(evaluated).items()
        if not name.startswith("evaluation")
    }
    assert found == stable_files(tmp_path / "run")


def test_evaluation_of_packed_rows_with_a_shared_prompt_has_the_figures_of_padded_ones(
    config: dict[str, Any], evaluated: Path, tmp_path: Path
):
    limits = {"packing": "bfd", "max_seq_length": 400, "share_prompt": True}
    # A learning rate that leaves the model where it is: rows of packed pairs are other batches.
    still = {"training.learning_rate": 1e-30}
    dpo(changed(config, **still), tmp_path / "padded")
    dpo(changed(config, dpo=limits, **still), tmp_path / "packed")
    one, other = (evaluations(tmp_path / name)[6] for name in ("padded", "packed"))
    assert one["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_evaluation_of_qrpo_needs_quantiles_too(config: dict[str, Any], tmp_path: Path):
    rows = preference_rows(3)
    del rows[1]["ref_rewards"]
    held_out = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"loss": {"name": "qrpo", "beta": 0.1}}
    settings |= {"evaluation": {"datasets": [{"path": str(held_out)}]}}
    with pytest.raises(PostTrainingError, match="1 of 3 pairs lack a quantile reward"):
        dpo(changed(config, **settings), tmp_path / "run")
