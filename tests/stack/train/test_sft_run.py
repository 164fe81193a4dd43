"""What a run leaves, that it is the same each time, and what stops it."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.sft_runs import changed, metrics, sft, stable_files
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.train.config import SftConfig
from post_training.train.metrics import rows_checksum


@pytest.fixture(scope="module")
def run_dir(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    sft(config, folder)
    return folder


def test_sft_twice_in_different_folders_gives_the_same_bytes(
    run_dir: Path, config: dict[str, Any], tmp_path: Path
):
    result = sft(config, tmp_path / "a" / "longer" / "name")
    again = tmp_path / "a" / "longer" / "name"
    assert stable_files(again) == stable_files(run_dir)
    assert metrics(again) == metrics(run_dir)
    compared = {*result.state_files, *result.unstable_files}
    compared |= {f"model/{file.name}" for file in (again / "model").iterdir()}
    last = {
        name for name in stable_files(again) if not name.startswith("checkpoints/checkpoint-10")
    }
    assert compared == {*last, "metrics.jsonl"} - {"checkpoints/latest"}


def test_sft_with_another_seed_gives_another_model(
    run_dir: Path, config: dict[str, Any], tmp_path: Path
):
    sft(changed(config, seed=8), tmp_path / "run")
    assert (
        stable_files(tmp_path / "run")["model/model.safetensors"]
        != stable_files(run_dir)["model/model.safetensors"]
    )


def test_sft_without_shuffling_takes_the_rows_as_they_stand(config: dict[str, Any], tmp_path: Path):
    length = {"shuffle": False, "max_steps": 7}  # 50 rows are six steps and a quarter
    sft(changed(config, training={**config["training"], **length}), tmp_path / "run")
    lines = (tmp_path / "run/steps.jsonl").read_text().splitlines()
    steps = [range(first, first + 8) for first in range(0, 56, 8)]
    assert [json.loads(line)["rows"] for line in lines] == [
        f"{rows_checksum(0, [row % 50 for row in rows]):010x}" for rows in steps
    ]


def test_sft_metrics_has_a_line_each_interval_with_times_apart(run_dir: Path):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["epoch"] for line in lines] == pytest.approx([0.48, 0.96, 1.44, 1.92])
    for line in lines:
        assert list(line) == [
            "step",
            "epoch",
            "loss",
            "completion_loss",
            "grad_norm",
            "learning_rate",
            "num_rows",
            "num_sequences",
            "num_tokens",
            "num_trained_tokens",
            "timing",
        ]
        assert line["timing"]["tokens_per_s"] > 0
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_sft_metrics_count_every_token_once(config: dict[str, Any], tmp_path: Path):
    # 25 steps of 8 rows are four epochs of the 50 rows.
    settings = {"training.max_steps": None, "training.num_train_epochs": 4}
    result = sft(changed(config, **settings), tmp_path / "run")
    counts = json.loads((tmp_path / "run" / "data" / "prepared.json").read_text())["counts"]
    assert result.metrics["num_steps"] == 25
    assert metrics(tmp_path / "run")[-1]["num_tokens"] == 4 * counts["num_tokens"]
    assert metrics(tmp_path / "run")[-1]["num_trained_tokens"] == 4 * counts["num_trained_tokens"]


def test_sft_keeps_the_newest_checkpoints_with_the_permissions_of_any_file(run_dir: Path):
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["checkpoint-10", "checkpoint-12", "latest"]
    os.umask(umask := os.umask(0))
    for file in run_dir.rglob("*"):
        expected = (0o777 if file.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(file.stat().st_mode) == expected, file


def test_sft_no_file_names_a_path_of_this_run(run_dir: Path, config: dict[str, Any]):
    for file in run_dir.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(run_dir.parent.parent).encode() not in content, file
            assert str(Path(config["model"]["path"]).parent).encode() not in content, file


def test_sft_model_loads_in_transformers_and_answers_as_trained(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "1 + 1?", "completion": "it is two"}\n')
    settings = {
        "model.path": str(model),
        "data.datasets": [{"path": str(path)}],
        "training.max_steps": 40,
    }
    sft(changed(config, **settings), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = trained.generate(**prompt, do_sample=False, max_new_tokens=30)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "it is two<|im_end|>"
    assert trained.config.use_cache is True


def test_sft_leaves_the_tokenizer_as_it_was(run_dir: Path, config: dict[str, Any]):
    before, after = hash_files(Path(config["model"]["path"])), hash_files(run_dir / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert after[file] == before[file]


def test_sft_loss_that_is_not_finite_stops_before_the_update(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PostTrainingError, match=r"loss is not finite at step 1 \(got nan\) with rows"
    ):
        sft(changed(config, **{"model.path": str(broken)}), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_sft_sequence_longer_than_the_model_is_refused(config: dict[str, Any], tmp_path: Path):
    with pytest.raises(PostTrainingError, match=r"sft.max_seq_length: must be ≤ 128, .*got 129"):
        sft(changed(config, **{"sft.max_seq_length": 129}), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"training.max_steps": None}, "set exactly one of max_steps, num_train_epochs"),
        ({"training.num_train_epochs": 1}, "set exactly one of max_steps, num_train_epochs"),
        ({"training.lr_scheduler_type": "constant"}, "constant has no warmup"),
        ({"training.lr_scheduler_kwargs": {"min_lr": 0.1}}, "cosine takes num_cycles (got min_lr)"),
        ({"training.lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr_rate"),
        ({"training.warmup": 1.5}, "must be whole steps, or a share < 1 (got 1.5)"),
    ],
)
def test_sft_config_that_cannot_be_meant_is_refused(
    settings: dict[str, Any], problem: str, config: dict[str, Any]
):
    with pytest.raises(ValidationError) as refusal:
        SftConfig.model_validate(changed(config, **settings))
    assert problem in str(refusal.value)
