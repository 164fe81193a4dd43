"""Tests that need torch, transformers and the rest: they run inside the image, by
tests/inside-image, and are not collected elsewhere. Each is marked `stack` here.

A tiny model, a small dataset, and a configuration that trains the one on the other.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import helpers.shapes  # noqa: F401 (before what it is to check)
from helpers.sft_runs import TINY
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import StageContext

if find_spec("torch") is None:
    collect_ignore_glob = ["*"]

    def pytest_report_header() -> str:
        return "tests/stack: left out here, without torch; tests/inside-image runs it"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("stack")


@pytest.fixture(scope="session", autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> None:
    quiet_libraries(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 sums of different lengths."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"question": f"What is {a} + {a * a}?", "answer": f"{a} + {a * a} = {a + a * a}" + "!" * a}
        for a in range(1, 51)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def init_model(dataset: Path) -> Callable[..., Path]:
    """Make a model in a folder: init_model(folder, key=value…)."""
    from post_training.stages.config import InitModelConfig
    from post_training.stages.init_model import run

    def make(run_dir: Path, **settings: Any) -> Path:
        run_dir.mkdir(parents=True, exist_ok=True)
        config = {**TINY, "corpus": [str(dataset)], **settings}
        result = run(InitModelConfig.model_validate(config), StageContext(run_dir))
        return run_dir / result.artifacts["model"]

    return make


@pytest.fixture(scope="session")
def model(init_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model_of_32(init_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its heads have a size that vLLM's attention on CPUs knows."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return init_model(tmp_path_factory.mktemp("model_of_32"), **shape)


@pytest.fixture(scope="session")
def dropout_model(
    init_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = init_model(tmp_path_factory.mktemp("dropout"), tie_word_embeddings=True)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.2}))
    return folder


@pytest.fixture(scope="session")
def config(dropout_model: Path, dataset: Path) -> dict[str, Any]:
    """Twelve steps of batch 8 as 4 × 2, checkpoints after 5, 10 and 12. The model has dropout, to
    catch a random state that wasn't restored. Tests change it with `changed`."""
    return {
        "model": {"path": str(dropout_model)},
        "data": {
            "chat_template": "chatml",
            "datasets": [
                {
                    "path": str(dataset),
                    "columns": {"prompt": "question", "completion": "answer"},
                }
            ],
        },
        "training": {
            "max_steps": 12,
            "effective_batch_size": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "lr_scheduler_type": "cosine",
            "warmup": 2,
            "weight_decay": 0.1,
        },
        "sft": {"max_seq_length": 96},
        "checkpointing": {"save_steps": 5, "save_total_limit": 2},
        "logging": {"logging_steps": 3},
        "num_threads": 1,
        "seed": 7,
    }
