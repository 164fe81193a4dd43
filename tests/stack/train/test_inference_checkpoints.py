"""Models for inference along the way: plain transformers loads them, wherever they are."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.sft_runs import changed, sft
from post_training.core.errors import UsageError
from post_training.core.hashing import hash_files


@pytest.fixture(scope="module")
def config(config: dict[str, Any]) -> dict[str, Any]:
    steps = {"save_steps": 6, "inference_checkpoint_steps": 6}
    return changed(config, checkpointing=steps)


def test_inference_checkpoint_is_a_model_of_its_step_for_plain_transformers(
    config: dict[str, Any], tmp_path: Path
):
    sft(config, tmp_path / "run")
    folder = tmp_path / "run" / "inference_checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-6"]
    assert hash_files(folder / "step-12") == hash_files(tmp_path / "run" / "model")
    weights = "model.safetensors"
    checkpoint = hash_files(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    assert hash_files(folder / "step-6")[weights] == checkpoint[weights]
    tokenizer = AutoTokenizer.from_pretrained(folder / "step-6")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert tokenizer.decode(asked["input_ids"][0]).endswith("<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(folder / "step-6")
    answer = model.generate(**asked, do_sample=False, max_new_tokens=3)
    assert answer.shape[1] > asked["input_ids"].shape[1]


def test_inference_checkpoints_elsewhere_are_the_runs_own(config: dict[str, Any], tmp_path: Path):
    place = tmp_path / "permanent" / "models"
    elsewhere = changed(config, **{"checkpointing.inference_checkpoint_path": str(place)})
    result = sft(elsewhere, tmp_path / "run")
    assert sorted(path.name for path in place.iterdir()) == ["step-12", "step-6"]
    assert "inference_checkpoints/step-6/model.safetensors" in result.state_files
    assert hash_files(place / "step-12") == hash_files(tmp_path / "run" / "model")
    assert sft(elsewhere, tmp_path / "run", resuming=True).state_files == result.state_files
    with pytest.raises(UsageError, match=r"models holds step-\d+ already, which is none of this"):
        sft(elsewhere, tmp_path / "other")
    moved = {"checkpointing.inference_checkpoint_path": str(tmp_path / "new")}
    with pytest.raises(
        UsageError, match=r"inference_checkpoint_path: this run has them in .*model"
    ):
        sft(changed(config, **moved), tmp_path / "run", resuming=True)
