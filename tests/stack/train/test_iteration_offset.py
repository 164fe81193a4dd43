"""A run whose steps are numbered on from those of an earlier training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import get_scheduler

from helpers.sft_runs import changed, metrics, sft
from post_training.core.errors import Interrupted
from post_training.core.hashing import sha256_file
from post_training.train.arguments import start_schedule_at
from post_training.train.optim import SCHEDULES, transformers_arguments

OFFSET, STEPS = 100, 4
RATE = 0.01
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 10},
}


@pytest.fixture(scope="module")
def runs(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps three times: from 0; from the offset; and from it with an end in between."""
    folder = tmp_path_factory.mktemp("runs")
    plain = changed(
        config,
        **{
            "training.max_steps": STEPS,
            "training.learning_rate": RATE,
            "training.warmup": 0,
            "training.lr_scheduler_type": "linear",
            "training.lr_scheduler_kwargs": {},
            "checkpointing.save_steps": 2,
            "checkpointing.save_total_limit": None,
            "checkpointing.inference_checkpoint_steps": 2,
            "logging.logging_steps": 1,
        },
    )
    numbered = changed(plain, **{"training.iteration_offset": OFFSET})
    sft(plain, folder / "plain")
    sft(numbered, folder / "numbered")
    with pytest.raises(Interrupted):
        sft(changed(numbered, **{"training.exit_interval": 2}), folder / "resumed")
    sft(numbered, folder / "resumed", resuming=True)
    return folder


def test_offset_numbers_steps_checkpoints_and_models_on(runs: Path):
    run_dir = runs / "numbered"
    numbers = [OFFSET + step for step in range(1, STEPS + 1)]
    assert [line["step"] for line in metrics(run_dir)] == numbers
    steps = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == numbers
    for name, prefix in (("checkpoints", "checkpoint-"), ("inference_checkpoints", "step-")):
        made = {path.name for path in (run_dir / name).glob(f"{prefix}*")}
        assert made >= {f"{prefix}102", f"{prefix}104"}
        assert not made & {f"{prefix}2", f"{prefix}4"}
    assert (run_dir / "checkpoints/latest").read_text() == "checkpoint-104\n"


def test_offset_takes_the_last_steps_of_the_longer_schedule(runs: Path):
    rates = [line["learning_rate"] for line in metrics(runs / "numbered")]
    whole = OFFSET + STEPS
    assert rates == pytest.approx([RATE * (whole - OFFSET - k) / whole for k in range(STEPS)])


def test_offset_leaves_the_rows_and_the_counts_of_the_run_alone(runs: Path):
    plain, numbered = (metrics(runs / name) for name in ("plain", "numbered"))
    for name in ("epoch", "num_rows", "num_tokens"):
        assert [line[name] for line in numbered] == [line[name] for line in plain]
    rows = [
        [json.loads(line)["rows"] for line in (runs / name / "steps.jsonl").open()]
        for name in ("plain", "numbered")
    ]
    assert rows[0] == rows[1]
    assert numbered[0]["loss"] == plain[0]["loss"]


def test_offset_of_a_run_that_was_stopped_and_went_on_ends_in_the_same_bytes(runs: Path):
    for path in (
        "model/model.safetensors",
        "steps.jsonl",
        "checkpoints/checkpoint-104/optimizer.pt",
    ):
        assert sha256_file(runs / "resumed" / path) == sha256_file(runs / "numbered" / path)
    assert metrics(runs / "resumed") == metrics(runs / "numbered")


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_started_at_a_step_has_the_rates_of_the_one_that_came_there(name: str):
    arguments = transformers_arguments(
        name, SCHEDULES[name](**NEEDED.get(name, {})).model_dump(exclude_none=True),
        0 if name == "constant" else 8, 40,
    )  # fmt: skip

    def scheduler() -> Any:
        return get_scheduler(
            name,
            SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE),
            num_warmup_steps=arguments["warmup_steps"],
            num_training_steps=40,
            scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"],
        )

    def rates(of: Any, num_steps: int) -> list[float]:
        found = []
        for _ in range(num_steps):
            found.append(of.get_last_lr()[0])
            assert of.optimizer.param_groups[0]["lr"] == found[-1]
            of.optimizer.step()
            of.step()
        return found

    for start in (5, 20):
        started = scheduler()
        start_schedule_at(started, start)
        assert rates(started, 40 - start) == rates(scheduler(), 40)[start:]
