"""The experiments of the real size, rehearsed: every stage runs, with tiny models and few rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.row_files import read_rows
from helpers.sft_runs import metrics
from post_training.core.hashing import sha256_file
from post_training.slurm.pipeline import plan_pipeline

pytestmark = pytest.mark.long

EXPERIMENTS = Path(__file__).parents[3] / "reproducibility"
CHATS = [
    {"messages": [{"role": "user", "content": f"{a} + {a}?"},
                  {"role": "assistant", "content": f"It is {2 * a}."}]}
    for a in range(200)
]  # fmt: skip
BRANCHES = [
    {
        "conversation_id": str(a),
        "initial_prompt": {"role": "user", "content": f"{a} + {a}?"},
        "conversation_branches": [
            {"messages": [{"role": "assistant", "parts": [{"type": "response", "content": "4"}]}]}
        ],
    }
    for a in range(6)
]
DOCUMENTS = [
    {"text": f"<<<|user|>>>{a} + {a}?<<<|user|>>><<<|assistant|>>>{2 * a}<<<|assistant|>>>"}
    for a in range(200)
]
SMALL_TRAINING = {"effective_batch_size": 2, "per_device_train_batch_size": 1}
SFT = {"num_threads": 1, "training.max_steps": 2,
       "model.attn_implementation": "sdpa", "model.dtype": "float32",
       "training.num_train_epochs": None, "training.padding_free": False,
       "training.mixed_precision": "no", "sft.max_seq_length": 128, "distributed.strategy": "ddp",
       **{f"training.{key}": value for key, value in SMALL_TRAINING.items()}}  # fmt: skip
DPO = {"num_threads": 1, "model.dtype": "float32", "training.max_steps": 2,
       "training.num_train_epochs": None,
       "training.mixed_precision": "no", "distributed.strategy": "ddp",
       **{f"training.{key}": value for key, value in SMALL_TRAINING.items()}}  # fmt: skip
PREPARED = {"sft.max_seq_length": 128}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "sft-apertus-8b": {"prepare": PREPARED, "prepare-eval": PREPARED, "sft": SFT},
    "sft-apertus-70b": {"prepare": PREPARED, "prepare-eval": PREPARED, "sft": SFT},
    "sft-lumi-30b": {"sft": SFT},
    "align-apertus": {
        "filter": {"max_sequence_length": 100},
        "generate": {"backend": "transformers", "model.dtype": "float32", "sampling.max_tokens": 8,
                     "sampling.n": 4},
        "logprobs": {"model.dtype": "float32"},
        "rewards": {"rewards[0].model.dtype": "float32"},
        "select": {"exclude_truncated": False},
        "dpo-norm": DPO,
        "qrpo": DPO,
    },
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def folder(init_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the experiments' inputs are: a tiny Apertus, and rows of each kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").mkdir()
    write(tmp_path / "inputs/train.jsonl", CHATS)
    write(tmp_path / "inputs/prompts.jsonl", BRANCHES)
    apertus = init_model(tmp_path / "base", architecture="apertus", chat_template="apertus")
    for name in ("model", "policy"):
        (tmp_path / "inputs" / name).symlink_to(apertus)
    return tmp_path


@pytest.fixture
def judge(folder: Path, model: Path) -> None:
    """A tiny Llama: transformers has no reward model of the Apertus architecture."""
    write(folder / "pairs.jsonl", [{"prompt": "1?", "chosen": "1", "rejected": "2"}] * 8)
    config = {
        "model": {"path": str(model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": "pairs.jsonl"}]},
        "training": {**SMALL_TRAINING, "max_steps": 2, "learning_rate": 1e-4},
        "num_threads": 1,
    }
    run_stage("reward-model", config, folder / "judge")
    (folder / "inputs/reward-model").symlink_to(folder / "judge/model")


def run_all(name: str) -> dict[str, Path]:
    """Run the experiment's stages in their order, changed as SMALL says: {stage: run folder}."""
    overrides = [
        f"stages.{stage}.config.{key}={json.dumps(value)}"
        for stage, settings in SMALL[name].items()
        for key, value in settings.items()
    ]
    ran = {}
    for run in plan_pipeline(EXPERIMENTS / name / "pipeline.yaml", overrides).runs:
        run_stage(run.stage, run.config.model_dump(), run.run_dir)
        ran[run.name] = run.run_dir
    return ran


@pytest.mark.parametrize("name", ["sft-apertus-8b", "sft-apertus-70b", "sft-lumi-30b"])
def test_fine_tuning_of_the_real_size_runs_from_rows_to_a_model(folder: Path, name: str):
    if name == "sft-lumi-30b":
        write(folder / "inputs/train.jsonl", DOCUMENTS)
    ran = run_all(name)
    assert (ran["sft"] / "model/model.safetensors").exists()
    assert metrics(ran["sft"])[-1]["step"] == 2


def test_alignment_of_the_real_size_runs_from_prompts_to_two_policies(folder: Path, judge: None):
    ran = run_all("align-apertus")
    pairs = read_rows(ran["select"] / "dataset/pairs.jsonl")
    assert pairs
    assert all(row["chosen_quantile_reward"] >= row["rejected_quantile_reward"] for row in pairs)
    policies = [sha256_file(ran[name] / "model/model.safetensors") for name in ("dpo-norm", "qrpo")]
    assert policies[0] != policies[1]
    first, *_ = metrics(ran["dpo-norm"])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
