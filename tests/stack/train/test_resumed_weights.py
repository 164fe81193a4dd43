"""A resumed run has the weights, optimizer state and random state that it had, or ends."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import make_family
from helpers.gloo_ranks import on_ranks
from helpers.rank_functions import resume_divided_model
from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import rank_file, run_sft_on_ranks
from helpers.tiny_models import MIXTURES, make_model
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import sha256_file
from post_training.records.run import RunDescription
from post_training.stages.context import StageContext
from post_training.train.checksums import FILES, Division, write_files

# Of experts by each naming; with a state; a folder of more than text. The others are `long`.
FAMILIES = [
    name if name in ("qwen3_moe", "Gemma 3") else pytest.param(name, marks=pytest.mark.long)
    for name in (*MIXTURES, "gpt-oss", "Falcon-H1", "Qwen3.5", "Gemma 3", "Mistral Small 3.1")
]


@pytest.fixture(scope="module")
def short(config: dict[str, Any]) -> dict[str, Any]:
    """Four steps of 2 rows, a checkpoint after each second."""
    settings = {"max_steps": 4, "effective_batch_size": 2, "warmup": 0}
    return changed(
        config,
        **{f"training.{name}": value for name, value in settings.items()},
        **{"checkpointing.save_steps": 2},
    )


def assert_killed_and_resumed_is_whole(
    config: dict[str, Any], folder: Path, world_size: int = 1
) -> None:
    done = [0] * world_size
    assert run_sft_on_ranks(config, folder / "whole", world_size=world_size) == done
    point = "before the random state is saved"
    assert -9 in run_sft_on_ranks(config, folder / "killed", kill_at=point, world_size=world_size)
    assert [path.name for path in (folder / "killed/checkpoints").glob("checkpoint-*")] == [
        "checkpoint-2"
    ]
    rank_file(folder / "killed", 0, "error").unlink(missing_ok=True)
    codes = run_sft_on_ranks(config, folder / "killed", resuming=True, world_size=world_size)
    error = rank_file(folder / "killed", 0, "error")
    assert codes == done, error.read_text() if error.exists() else codes
    assert metrics(folder / "killed") == metrics(folder / "whole")
    assert stable_files(folder / "killed") == stable_files(folder / "whole")


@pytest.mark.parametrize("family", FAMILIES)
def test_model_whose_files_have_other_names_ends_in_the_same_bytes(
    family: str, short: dict[str, Any], model: Path, tmp_path: Path
):
    """transformers' own resume leaves its experts as the base model has them."""
    folder = tmp_path / "model"
    if family in MIXTURES:
        make_model(family, model, folder, **MIXTURES[family])
    else:
        make_family(family, model, folder)
    settings = {"model.path": str(folder)}
    if family == "gpt-oss":
        settings["model.attn_implementation"] = "eager"
    assert_killed_and_resumed_is_whole(changed(short, **settings), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"lora": {"rank": 4}}),
        (2, {"distributed": {"strategy": "zero1"}, "training.mixed_precision": "bf16"}),
        (2, {"distributed": {"strategy": "zero2", "offload": "optimizer"}}),
        (2, {"distributed": {"strategy": "zero3"}}),
        (2, {"distributed": {"strategy": "zero3", "offload": "parameters"}}),
        (2, {"distributed": {"strategy": "zero3"}, "lora": {"rank": 4}}),
        (1, {"distributed": {"strategy": "zero1"}}),
    ],
    ids=["lora", "zero1-bf16", "zero2-offload", "zero3", "zero3-offload", "zero3-lora", "alone"],
)
def test_mixture_that_is_trained_otherwise_ends_in_the_same_bytes(
    world_size: int, settings: dict[str, Any], short: dict[str, Any], model: Path, tmp_path: Path
):
    mixture = tmp_path / "model"
    make_model("qwen3_moe", model, mixture, **MIXTURES["qwen3_moe"])
    settings = {"model.path": str(mixture), "training.per_device_train_batch_size": 1, **settings}
    assert_killed_and_resumed_is_whole(changed(short, **settings), tmp_path, world_size)


@pytest.fixture(scope="module")
def killed(short: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 2."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    assert run_sft_on_ranks(short, run_dir, kill_at="before the random state is saved") == [-9]
    return run_dir


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add(path: Path) -> None:
    path.write_text("x")


CHANGES = {
    "model.safetensors": (flip, "was changed since the checkpoint was written"),
    "optimizer.pt": (flip, "was changed since"),
    "scheduler.pt": (flip, "was changed since"),
    "rng_state.pth": (Path.unlink, "is gone from the checkpoint"),
    "totals.json": (flip, "was changed since"),
    "checksums/rank-0.json": (flip, "was changed since"),
    "pytorch_model.bin": (add, "was added to the checkpoint"),
    "checksums/files.json": (Path.unlink, "the checkpoint has no checksums/files.json"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoint_with_a_changed_file_is_refused_by_its_name(
    name: str, short: dict[str, Any], copied: Path
):
    checkpoint = copied / "checkpoints/checkpoint-2"
    change, problem = CHANGES[name]
    change(checkpoint / name)
    steps = (copied / "steps.jsonl").read_bytes()
    with pytest.raises(UsageError, match=problem) as raised:
        sft(short, copied, resuming=True)
    assert raised.value.where in (str(checkpoint / name), str(checkpoint))
    assert (copied / "steps.jsonl").read_bytes() == steps


def test_whole_checkpoint_of_another_run_is_refused(short: dict[str, Any], tmp_path: Path):
    """Of the same shapes, with checksums that are its own."""
    runs = {}
    for seed in (1, 2):
        config, run_dir = {**short, "seed": seed}, tmp_path / f"{seed}"
        # Of the topology a flag lets change.
        description = RunDescription("sft", {"seed": seed}, {"num_threads": seed}, {}, None, {})
        sft(config, run_dir, description=description)
        runs[seed] = config, run_dir, description
    config, run_dir, description = runs[1]
    sft(config, run_dir, resuming=True, description=replace(description, topology={}))
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(runs[2][1] / "checkpoints", run_dir / "checkpoints")
    with pytest.raises(UsageError, match="the checkpoint is of another run"):
        sft(config, run_dir, resuming=True, description=description)


def change_weights(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def change_torch_file(path: Path, change: Callable[[Any], None]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


NORM = "model.layers.1.input_layernorm.weight"


def other_value(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights[NORM][3].add_(1e-6))


def other_dtype(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({NORM: weights[NORM].bfloat16()}))


def other_shape(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({NORM: weights[NORM][:8].clone()}))


def other_name(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update(other=weights.pop(NORM)))


def further_name(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update(other=weights[NORM].clone()))


def other_average(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.pt"
    change_torch_file(path, lambda state: state["state"][0]["exp_avg"].mul_(2))


def other_rate(checkpoint: Path) -> None:
    path = checkpoint / "scheduler.pt"
    change_torch_file(path, lambda state: state.update(last_epoch=1))


def other_random_state(checkpoint: Path) -> None:
    path = checkpoint / "rng_state.pth"
    change_torch_file(path, lambda state: state["cpu"][64].add_(1))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (other_value, f"weights: {NORM} is not what it was when the checkpoint was written"),
        (other_dtype, f"weights: {NORM} is not what it was when"),
        (other_shape, rf"weights of another size than config.json says: {NORM} is \[8\], must be"),
        (other_name, rf"1 weights are missing: {NORM}"),
        (further_name, "1 weights are none of this model's: other"),
        (other_average, "optimizer: state.model.embed_tokens.weight.exp_avg is not what it was"),
        (other_rate, "schedule: last_epoch is not what it was when"),
        (other_random_state, "random: torch is not what it was when"),
    ],
)
def test_checkpoint_that_is_read_as_something_else_ends_before_a_step(
    change: Callable[[Path], None], problem: str, short: dict[str, Any], copied: Path
):
    """As if a library read other weights than it wrote: the files are as the checkpoint says."""
    checkpoint = copied / "checkpoints/checkpoint-2"
    change(checkpoint)
    write_files(checkpoint, Division("ddp", 1), StageContext(copied))
    with pytest.raises(PostTrainingError, match=problem):
        sft(short, copied, resuming=True)
    # Those that were made after the checkpoint are made again.
    assert len((copied / "steps.jsonl").read_text().splitlines()) == 2


def test_adapter_that_lacks_a_weight_ends_before_a_step(
    short: dict[str, Any], model: Path, tmp_path: Path
):
    """PEFT would go on with one that is drawn anew."""
    settings = {"model.path": str(model), "training.max_steps": 2, "lora": {"rank": 4}}
    adapted = changed(short, **settings)
    sft(adapted, tmp_path)
    checkpoint = tmp_path / "checkpoints/checkpoint-2"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    del adapter[next(name for name in adapter if name.endswith("q_proj.lora_B.weight"))]
    save_file(adapter, checkpoint / "adapter_model.safetensors", {"format": "pt"})
    write_files(checkpoint, Division("ddp", 1), StageContext(tmp_path))
    with pytest.raises(PostTrainingError, match=r"weights: .*q_proj.lora_B.* is not what it was"):
        sft(adapted, tmp_path, resuming=True)


def test_checkpoint_of_another_strategy_is_refused(short: dict[str, Any], copied: Path):
    zero = changed(short, distributed={"strategy": "zero1"})
    with pytest.raises(UsageError, match=r"strategy ddp can't be continued with zero1"):
        sft(zero, copied, resuming=True)


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_zero_with_another_part_on_one_rank_ends_on_both(
    strategy: str, short: dict[str, Any], model: Path, tmp_path: Path
):
    settings = {"model.path": str(model), "training.per_device_train_batch_size": 1}
    divided = changed(short, distributed={"strategy": strategy}, **settings)
    run_dir = tmp_path / "run"
    assert run_sft_on_ranks(divided, run_dir, world_size=2) == [0, 0]
    checkpoint = run_dir / "checkpoints/checkpoint-4"
    [path] = checkpoint.glob("global_step4/*zero_pp_rank_1_*_optim_states.pt")
    groups = {"zero2": "single_partition_of_fp32_groups", "zero3": "fp32_flat_groups"}[strategy]
    change_torch_file(
        path, lambda state: state["optimizer_state_dict"][groups][0].data[5].add_(1e-3)
    )
    resumed_with_changed_files(checkpoint, FILES, path)
    assert run_sft_on_ranks(divided, run_dir, world_size=2, resuming=True) == [1, 1]
    error = rank_file(run_dir, 0, "error").read_text()
    assert "is not what it was when the checkpoint was written" in error
    assert " on rank " in error
    assert "rank 0 failed: " in rank_file(run_dir, 1, "error").read_text()


def resumed_with_changed_files(checkpoint: Path, files: str, path: Path) -> None:
    """The digest of `path` in the record of the checkpoint's files."""
    record = json.loads((checkpoint / files).read_text())
    record["files"][path.relative_to(checkpoint).as_posix()] = sha256_file(path)
    (checkpoint / files).write_text(json.dumps(record))


def test_fsdp2_part_of_a_rank_is_compared_with_what_that_rank_had(tmp_path: Path):
    first, second = on_ranks(resume_divided_model, 2, tmp_path)
    assert first == [None, None]
    assert second == [None, "weights: 0.weight is not what it was when the checkpoint was written"]
