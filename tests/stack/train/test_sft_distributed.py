"""ZeRO on two ranks: the model of one rank, the same bytes again, and killed and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft
from helpers.stage_process import rank_file, run_sft_on_ranks
from post_training.core.hashing import hash_files

STRATEGIES = [
    {"strategy": "zero1"},
    {"strategy": "zero2"},
    {"strategy": "zero3"},
    {"strategy": "zero2", "offload": "optimizer"},
    {"strategy": "zero3", "offload": "parameters"},
]
NAMES = ["-".join(strategy.values()) for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def config(config: dict[str, Any], model: Path) -> dict[str, Any]:
    return changed(config, **{"model.path": str(model)})


@pytest.fixture(scope="module")
def one_rank(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    sft(config, run_dir)
    return run_dir


def error(run_dir: Path, rank: int = 0) -> str:
    file = rank_file(run_dir, rank, "error")
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
def test_zero_trains_what_one_rank_trains(
    strategy: dict[str, str], config: dict[str, Any], one_rank: Path, tmp_path: Path
):
    divided = changed(config, distributed=strategy)
    codes = run_sft_on_ranks(divided, tmp_path / "run", world_size=2)
    assert codes == [0, 0], error(tmp_path / "run")
    for one, two in zip(metrics(one_rank), metrics(tmp_path / "run"), strict=True):
        assert one["num_tokens"] == two["num_tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    expected = AutoModelForCausalLM.from_pretrained(one_rank / "model").state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert weights.sub(found[name]).abs().max() < 2e-3, name
    said = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert said["zero_optimization"]["stage"] == int(strategy["strategy"][-1])


@pytest.mark.parametrize("strategy", ["zero1", pytest.param("zero3", marks=pytest.mark.long)])
def test_zero_on_one_process_without_a_launcher_trains_what_ddp_trains(
    strategy: str, config: dict[str, Any], one_rank: Path, tmp_path: Path
):
    alone = changed(config, distributed={"strategy": strategy})
    assert run_sft_on_ranks(alone, tmp_path / "run") == [0], error(tmp_path / "run")
    for plain, divided in zip(metrics(one_rank), metrics(tmp_path / "run"), strict=True):
        assert plain["loss"] == pytest.approx(divided["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        # Its optimizer is divided as that of zero2, and its weights rounded as those of zero3.
        pytest.param("zero1", "bf16", marks=pytest.mark.long),
        ("zero2", "no"),
        ("zero3", "bf16"),
    ],
)
def test_zero_killed_while_saving_and_resumed_ends_in_the_same_bytes(
    strategy: str, precision: str, config: dict[str, Any], tmp_path: Path
):
    settings = {"distributed": {"strategy": strategy}, "training.mixed_precision": precision}
    divided = changed(config, **settings)
    run_sft_on_ranks(divided, tmp_path / "whole", world_size=2)
    point = "before the random state is saved"
    assert -9 in run_sft_on_ranks(divided, tmp_path / "killed", world_size=2, kill_at=point)
    assert run_sft_on_ranks(divided, tmp_path / "killed", world_size=2, resuming=True) == [0, 0]
    assert hash_files(tmp_path / "killed" / "model") == hash_files(tmp_path / "whole" / "model")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "schedule", "settings"),
    [
        ("zero1", "cosine_with_min_lr", {"min_lr": 0.002}),
        ("zero2", "polynomial", {"lr_end": 0.002}),
        ("zero3", "polynomial", {"lr_end": 0.002}),
    ],
)
def test_zero_follows_a_schedule_that_ends_at_a_rate(
    strategy: str, schedule: str, settings: dict[str, float], config: dict[str, Any], tmp_path: Path
):
    """Its optimizers wrap torch's, of which such a schedule reads the first rate."""
    of_schedule = {
        "training.max_steps": 4,
        "training.lr_scheduler_type": schedule,
        "training.lr_scheduler_kwargs": settings,
        "training.mixed_precision": "bf16",
    }
    plain = changed(config, **of_schedule)
    sft(plain, tmp_path / "plain")
    divided = changed(plain, distributed={"strategy": strategy})
    assert run_sft_on_ranks(divided, tmp_path / "run") == [0], error(tmp_path / "run")
    rates = [
        [line["learning_rate"] for line in metrics(tmp_path / name) if "learning_rate" in line]
        for name in ("plain", "run")
    ]
    assert rates[0] == rates[1] != []


def test_zero3_inference_checkpoint_is_a_whole_model(config: dict[str, Any], tmp_path: Path):
    """Written by the first rank alone, it would hold the first rank's share."""
    settings = {"checkpointing.inference_checkpoint_steps": 6, "distributed": {"strategy": "zero3"}}
    assert run_sft_on_ranks(changed(config, **settings), tmp_path / "run", world_size=2) == [0, 0]
    folder = tmp_path / "run" / "inference_checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-6"]
    assert hash_files(folder / "step-12") == hash_files(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "step-6")
    assert all(weights.numel() for weights in model.parameters())


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_in_mixed_precision_with_lora_saves_the_adapter_of_all_ranks(
    strategy: str, config: dict[str, Any], tmp_path: Path
):
    settings = {
        "distributed": {"strategy": strategy},
        "lora": {"rank": 4},
        "training.mixed_precision": "bf16",
    }
    codes = run_sft_on_ranks(changed(config, **settings), tmp_path / "run", world_size=2)
    assert codes == [0, 0], error(tmp_path / "run")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert all(weights.numel() and float(weights.abs().max()) > 0 for weights in adapter.values())


_GROUP = """
from post_training.train.arguments import join_ranks
from post_training.train.config import SftConfig
join_ranks(SftConfig.model_construct(
    distributed=SftConfig.model_fields["distributed"].annotation(strategy="zero2")))
import torch.distributed as dist
from deepspeed.utils import groups
print("same" if groups._clone_world_group() is dist.group.WORLD else "copy")
"""


@pytest.mark.parametrize(("value", "expected"), [("1", "same"), ("0", "copy")])
def test_zero_takes_the_first_group_of_all_ranks_where_it_is_told(value: str, expected: str):
    environment = {**os.environ, "POST_TRAINING_ONE_PROCESS_GROUP": value}
    done = subprocess.run(
        [sys.executable, "-c", _GROUP], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == expected, done.stderr


_RUN = """
import json, sys
from pathlib import Path
from helpers.stage_process import run_sft_on_ranks
print(run_sft_on_ranks(json.loads(sys.argv[1]), Path(sys.argv[2]), world_size=2))
"""


@pytest.mark.long
def test_zero_of_one_group_has_the_bytes_of_two(config: dict[str, Any], tmp_path: Path):
    settings = json.dumps(changed(config, distributed={"strategy": "zero2"}))
    hashes = []
    for value in ("0", "1"):
        # A process of its own: this one's server of processes has its environment already.
        environment = {
            **os.environ,
            "POST_TRAINING_ONE_PROCESS_GROUP": value,
            "PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}",
        }
        command = [sys.executable, "-c", _RUN, settings, str(tmp_path / value)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[0, 0]", error(tmp_path / value)
        hashes.append(hash_files(tmp_path / value / "model"))
    assert hashes[0] == hashes[1]
