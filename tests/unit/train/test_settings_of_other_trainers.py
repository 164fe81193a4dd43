"""Settings by the names and in the forms that other trainers have."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.config.model import Role, recipe_hash, settings_by_role
from post_training.train.config import SftConfig
from post_training.train.training_config import merge_deepspeed, steps_per_epoch

CONFIG: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"chat_template": "chatml", "datasets": [{"path": "rows.jsonl"}]},
    "sft": {"max_seq_length": 64},
    "training": {
        "max_steps": 1,
        "effective_batch_size": 8,
        "learning_rate": 1e-5,
        "mixed_precision": "bf16",
    },
}
ZERO = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"}


def sft(**blocks: Any) -> SftConfig:
    return SftConfig.model_validate(CONFIG | blocks)


def test_report_to_none_is_nobody():
    for given in ("none", ["none"], []):
        assert sft(logging={"report_to": given}).logging.report_to == []
    with pytest.raises(ValidationError):
        sft(logging={"report_to": ["none", "wandb"]})


def test_entity_and_folder_of_wandb_change_no_identity():
    plain = sft()
    named = sft(logging={"wandb_entity": "team", "wandb_dir": "/scratch/wandb"})
    assert recipe_hash("sft", named) == recipe_hash("sft", plain)
    assert settings_by_role(named)[Role.TOPOLOGY] == settings_by_role(plain)[Role.TOPOLOGY]
    assert "logging.wandb_entity" not in settings_by_role(plain)[Role.PLACEMENT]


def test_steps_per_epoch_are_at_least_one_and_rounded_up():
    assert [steps_per_epoch(n, num_rows=50, effective_batch_size=8) for n in (1, 2, 3, 50)] == [
        *(7, 4, 3, 1),
    ]


def test_steps_and_epochs_together_are_refused():
    with pytest.raises(ValidationError, match="set either save_steps or saves_per_epoch"):
        sft(checkpointing={"save_steps": 5, "saves_per_epoch": 2})
    rows = {"datasets": [{"path": "held.jsonl"}], "eval_steps": 5, "evals_per_epoch": 1}
    with pytest.raises(ValidationError, match="set either eval_steps or evals_per_epoch"):
        sft(evaluation=rows)


def test_deepspeed_config_of_a_file_is_its_content(tmp_path: Path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": ZERO}))
    (tmp_path / "ds.yaml").write_text("zero_optimization: {stage: 2, overlap_comm: true}\n")
    of_json, of_yaml, of_mapping = (
        sft(distributed={"strategy": "zero2", "deepspeed_config": given})
        for given in (
            str(tmp_path / "ds.json"),
            str(tmp_path / "ds.yaml"),
            {"zero_optimization": ZERO},
        )
    )
    assert of_json == of_mapping
    assert of_yaml.distributed.deepspeed_config == {
        "zero_optimization": {"stage": 2, "overlap_comm": True}
    }
    # What is recorded is read again as it is, and counts as topology.
    assert SftConfig.model_validate_json(of_json.model_dump_json()) == of_json
    topology = settings_by_role(of_json)[Role.TOPOLOGY]
    assert topology["distributed.deepspeed_config"] == {"zero_optimization": ZERO}
    plain = settings_by_role(sft(distributed={"strategy": "zero2"}))[Role.TOPOLOGY]
    assert "distributed.deepspeed_config" not in plain


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"gradient_clipping": 2.0},
            "gradient_clipping is 2.0, and by the other settings it is 1.0",
        ),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, and .* it is 2"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True"),
        ({"train_batch_size": 16}, "train_batch_size is 16, and by the other settings it is 8"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device is 'cpu', and by the other settings",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}},
            "optimizer and scheduler are named",
        ),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion', and .* is 'adamw'"),
        ({"zero_optimization": 2}, "zero_optimization must be a mapping"),
        (
            {"zero_optimization": {"offload_param": "cpu"}},
            "zero_optimization.offload_param must be a mapping",
        ),
        ("nowhere.json", "nowhere.json can't be read"),
    ],
)
def test_deepspeed_config_against_another_setting_is_refused_by_name(given: Any, problem: str):
    with pytest.raises(ValidationError, match=problem):
        sft(distributed={"strategy": "zero2", "deepspeed_config": given})


def test_deepspeed_config_without_zero_is_refused():
    with pytest.raises(ValidationError, match=r"zero1, zero2 or zero3 \(got ddp\)"):
        sft(distributed={"deepspeed_config": {}})


def test_deepspeed_config_is_merged_and_auto_is_ours():
    ours = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "gradient_clipping": 1.0}
    given = {
        "zero_optimization": ZERO,
        "gradient_clipping": "auto",
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW"},
        "bf16": None,
        "flops_profiler": {"enabled": True},
    }
    assert merge_deepspeed(ours, given) == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5, "overlap_comm": True},
        "gradient_clipping": 1.0,
        "flops_profiler": {"enabled": True},
    }


def test_iteration_offset_is_another_recipe_and_without_it_the_recipe_is_as_before():
    plain = sft()
    numbered = sft(training={**CONFIG["training"], "iteration_offset": 1000})
    assert recipe_hash("sft", numbered) != recipe_hash("sft", plain)
    assert settings_by_role(numbered)[Role.RECIPE]["training.iteration_offset"] == 1000
    assert "training.iteration_offset" not in settings_by_role(plain)[Role.RECIPE]
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        sft(training={**CONFIG["training"], "iteration_offset": -1})
