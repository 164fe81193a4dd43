"""Phi-3's long factors are of a whole batch in transformers: no row may go that far."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.dpo_runs import dpo, preference_rows
from helpers.row_files import read_rows, write_rows
from helpers.sft_runs import changed, sft
from helpers.tiny_models import make_model
from post_training.annotate.config import VllmConfig
from post_training.annotate.engine import VllmEngine
from post_training.core.errors import PostTrainingError
from post_training.models.config import ModelConfig
from post_training.stages.context import StageContext

ORIGINAL = 64
LINE = rf"must be ≤ {ORIGINAL}, the model's original_max_position_embeddings \(got \d+\): beyond it"


@pytest.fixture(scope="module")
def longrope(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longrope") / "model"
    make_model(
        "phi3",
        model,
        folder,
        max_position_embeddings=256,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": ORIGINAL,
        },
    )
    return folder


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_sft_of_rows_that_may_reach_the_long_factors_is_refused(
    packing: str, longrope: Path, config: dict[str, Any], tmp_path: Path
):
    settings = {"model.path": str(longrope), "training.max_steps": 1, "sft.packing": packing}
    with pytest.raises(PostTrainingError, match=rf"sft\.max_seq_length: {LINE}"):
        sft(changed(config, **{**settings, "sft.max_seq_length": ORIGINAL + 1}), tmp_path / "long")
    sft(changed(config, **{**settings, "sft.max_seq_length": ORIGINAL}), tmp_path / "short")


def test_dpo_of_rows_that_reach_the_long_factors_is_refused(longrope: Path, tmp_path: Path):
    rows = preference_rows(6)
    rows[0]["chosen"][0]["content"] += " so" * ORIGINAL
    config = {
        "model": {"path": str(longrope)},
        "data": {"chat_template": "chatml",
                 "datasets": [{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}]},
        "dpo": {"max_prompt_length": 128, "max_completion_length": 128},
        "loss": {"name": "dpo", "beta": 0.1},
        "training": {"max_steps": 1, "effective_batch_size": 2, "learning_rate": 1e-3,
                     "per_device_train_batch_size": 2},
        "num_threads": 1,
    }  # fmt: skip
    with pytest.raises(PostTrainingError, match=f"the longest prompt and answer: {LINE}"):
        dpo(config, tmp_path / "run")


def test_logprobs_and_samples_stay_below_the_long_factors(longrope: Path, tmp_path: Path):
    rows = [
        {"question": "short", "answer": "yes"},
        {"question": "long", "answer": "so " * ORIGINAL},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = {
        "model": {"path": str(longrope)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(data)}],
                 "on_error": "quarantine"},
        "num_threads": 1,
    }  # fmt: skip
    run_stage("logprobs", config, tmp_path / "scored")
    [reject] = (tmp_path / "scored/rejects.jsonl").read_text().splitlines()
    assert f"(the model reads {ORIGINAL})" in json.loads(reject)["problem"]
    sampling = {"n": 2, "max_tokens": 200}
    run_stage("generate", {**config, "sampling": sampling}, tmp_path / "drawn")
    for row in read_rows(tmp_path / "drawn"):
        lengths = [each["completion_length"] for each in row["conversation_branches"][1:]]
        assert max(lengths) + row["prompt_length"] <= ORIGINAL


def test_engine_that_would_take_the_long_factors_for_all_rows_is_refused(
    longrope: Path, tmp_path: Path
):
    with pytest.raises(PostTrainingError, match=rf"vllm\.max_model_len: {LINE}"):
        VllmEngine(
            ModelConfig(path=longrope),
            VllmConfig(max_model_len=ORIGINAL + 1),
            StageContext(tmp_path),
            sequences_per_prompt=1,
        )
