"""Preference training with divided weights and with LoRA trains what one rank trains whole."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.dpo_runs import dpo, preference_rows
from helpers.row_files import write_rows
from helpers.sft_runs import changed, metrics
from helpers.stage_process import rank_file, run_stage_on_ranks


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps of 4 × 2 pairs with an evaluation at the end."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = preference_rows(21)
    held_out = write_rows(folder / "held-out.jsonl", rows[16:])
    return {
        "model": {"path": str(model)},
        "data": {
            "chat_template": "chatml",
            "datasets": [{"path": str(write_rows(folder / "pairs.jsonl", rows[:16]))}],
        },
        "dpo": {},
        "loss": {"name": "dpo", "beta": 0.3},
        "training": {
            "max_steps": 6,
            "effective_batch_size": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.005,
        },
        "evaluation": {"datasets": [{"path": str(held_out)}], "per_device_eval_batch_size": 2},
        "logging": {"logging_steps": 1},
        "num_threads": 1,
        "seed": 7,
    }


def assert_same_training(one: Path, other: Path) -> None:
    lines = [metrics(run_dir) for run_dir in (one, other)]
    assert lines[0][-1]["eval"]["loss"] != pytest.approx(0.6931, abs=0.001)
    for ours, theirs in zip(*lines, strict=True):
        ours, theirs = ours.get("eval", ours), theirs.get("eval", theirs)
        for name in ("loss", "rewards/margins", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(
    "lora",
    [pytest.param(None, id="whole", marks=pytest.mark.long), pytest.param({"rank": 4}, id="lora")],
)
def test_dpo_with_zero3_on_two_ranks_trains_what_one_rank_trains(
    lora: dict[str, Any] | None, config: dict[str, Any], tmp_path: Path
):
    config = changed(config, lora=lora)
    result = dpo(config, tmp_path / "one")
    assert ("adapter" in result.artifacts) == (lora is not None)
    divided = changed(config, distributed={"strategy": "zero3"})
    codes = run_stage_on_ranks("dpo", divided, tmp_path / "two", world_size=2)
    error = rank_file(tmp_path / "two", 0, "error")
    assert codes == [0, 0], error.read_text() if error.exists() else codes
    assert_same_training(tmp_path / "one", tmp_path / "two")
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("one", "two")
    )
    for name, weights in expected.items():
        assert weights.sub(found[name]).abs().max() < 2e-3, name


def test_dpo_with_lora_trains_the_adapter_alone(config: dict[str, Any], tmp_path: Path):
    settings = {"lora": {"rank": 4, "target_modules": ["q_proj"]}, "training.learning_rate": 0.05}
    dpo(changed(config, **settings), tmp_path / "run")
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (Path(config["model"]["path"]), tmp_path / "run/model")
    )
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert all(name.endswith("q_proj.weight") for name in moved)
    first, *_, last = (line for line in metrics(tmp_path / "run") if "eval" not in line)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # of the untouched model
    assert last["rewards/margins"] > 0.01
