"""All stages from a model to a policy trained on its own samples, each on what the last left."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.branch_rows import data
from helpers.row_files import read_rows
from helpers.sft_runs import metrics
from post_training.core.errors import PostTrainingError
from post_training.models.reference import Reference

EXPERIMENT = Path(__file__).parents[3] / "reproducibility/gsm8k-alignment"
TRAINING = {"effective_batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 0.001}


def solutions(path: Path) -> Path:
    """In the form of GSM8K's example_model_solutions.jsonl."""
    rows = [
        {
            "question": f"{a} + {a}?",
            "ground_truth": f"A: {2 * a}",
            "good": {"is_correct": True, "solution": f"It is {2 * a}"},
            "bad": {"is_correct": False, "solution": f"It is {2 * a + 1}"},
        }
        for a in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pipeline_from_samples_to_a_trained_policy(model: Path, tmp_path: Path):
    path = solutions(tmp_path / "solutions.jsonl")
    offline: dict[str, Any] = {
        "transforms": [str(EXPERIMENT / "model_solutions.py")],
        "datasets": [{"path": str(path), "transform": "model_solutions"}],
    }
    policy = {"path": str(model)}
    functions = [str(EXPERIMENT / "final_number.py")]
    right = {"name": "right", "function": "final_number"}

    def run(stage: str, name: str, **config: Any) -> Path:
        run_stage(stage, {"num_threads": 1, **config}, tmp_path / name)
        return tmp_path / name

    run("rewards", "offline", data=offline, functions=functions, rewards=[right])
    run("select", "offline-pairs", data=data(tmp_path / "offline"), samples="offline",
        min_ref_rewards=0)  # fmt: skip
    pairs = tmp_path / "offline-pairs/dataset/pairs.jsonl"
    assert [row["chosen_reward"] - row["rejected_reward"] for row in read_rows(pairs)] == [1.0] * 8
    run("reward-model", "judge", model=policy, data=data(pairs, chat_template="chatml"),
        training={**TRAINING, "max_steps": 2})  # fmt: skip

    run("generate", "samples", model=policy, data={**offline, "chat_template": "chatml"},
        sampling={"n": 3, "max_tokens": 6})  # fmt: skip
    run("logprobs", "scored", model=policy,
        data=data(tmp_path / "samples", chat_template="chatml"))  # fmt: skip
    judged = {"name": "judged", "model": {"path": str(tmp_path / "judge/model")}}
    run("rewards", "rewarded", data=data(tmp_path / "scored"), functions=functions,
        rewards=[right, judged])  # fmt: skip
    run("select", "pairs", data=data(tmp_path / "rewarded"), reward="judged", samples="both",
        exclude_truncated=False, strategy={"name": "best-worst", "num_pairs": 2})  # fmt: skip
    for name in ("scored", "rewarded", "pairs"):
        assert Reference.read(tmp_path / name / "dataset") is not None
    # The model's own distribution: what was said of a sample when it was drawn.
    for row in read_rows(tmp_path / "scored"):
        for each in row["conversation_branches"]:
            if each["is_reference_completion"]:
                drawn = sum(each["completion_token_logprobs"])
                assert each["completion_ref_logprob"] == pytest.approx(drawn, abs=1e-4)

    pairs = tmp_path / "pairs/dataset/pairs.jsonl"
    assert len(read_rows(pairs)) == 16
    training = {
        "data": data(pairs, chat_template="chatml"),
        "dpo": {"truncated_completions": "train"},
        "reference": {"logprobs": "stored"},
        "training": {**TRAINING, "max_steps": 2},
        "logging": {"logging_steps": 1},
    }
    run("dpo", "dpo", model=policy, loss={"name": "qrpo", "beta": 0.1}, **training)
    assert len(metrics(tmp_path / "dpo")) == 2
    other = {"path": str(tmp_path / "dpo/model")}
    with pytest.raises(PostTrainingError, match="another model"):
        run("dpo", "other", model=other, loss={"name": "dpo", "beta": 0.1}, **training)
