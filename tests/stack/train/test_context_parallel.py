"""Two ranks that share each row train what one rank does with whole rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft
from helpers.stage_process import rank_file, run_sft_on_ranks
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.models.context_parallel import RowPart, share_rows

SHARED = {"distributed": {"context_parallel_size": 2}}


@pytest.fixture(scope="module")
def config(config: dict[str, Any], model: Path, dataset: Path) -> dict[str, Any]:
    settings = {
        "model": {"path": str(model), "attn_implementation": "varlen"},
        "training.per_device_train_batch_size": 2,
        "training.max_steps": 4,
        "evaluation": {"datasets": [{"path": str(dataset)}], "debug_subsample": 5,
                       "per_device_eval_batch_size": 2},
        "logging.logging_steps": 1,
    }  # fmt: skip
    return changed(config, **settings)


def check_same(one_rank: Path, shared: Path) -> None:
    for one, two in zip(metrics(one_rank), metrics(shared), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if isinstance(value, float):
                assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
            elif isinstance(value, dict):
                assert two[name] == pytest.approx(value, rel=1e-4), name
            else:
                assert two[name] == value, name
    expected = load_file(one_rank / "model/model.safetensors")
    found = load_file(shared / "model/model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert weights.sub(found[name]).abs().max() < 2e-3, name
    files = [hash_files(run / "model") for run in (one_rank, shared)]
    assert files[0]["config.json"] == files[1]["config.json"]


@pytest.mark.parametrize(
    "settings",
    [
        {"sft.packing": "bfd", "training.gradient_checkpointing": True},
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"training.padding_free": True}, marks=pytest.mark.long),
        pytest.param({"loss": {"name": "plw", "prompt_loss_weight": 0.1,
                               "sequence_level_loss": True}}, marks=pytest.mark.long),
        pytest.param({"distributed.strategy": "zero2"}, marks=pytest.mark.long),
        pytest.param({"distributed.strategy": "zero3", "distributed.offload": "parameters"},
                     marks=pytest.mark.long),
        pytest.param({"lora": {"rank": 4}}, marks=pytest.mark.long),
    ],
    ids=str,
)  # fmt: skip
def test_two_ranks_that_share_rows_train_what_one_does_with_whole_rows(
    settings: dict[str, Any], config: dict[str, Any], tmp_path: Path
):
    alone = changed(config, **settings)
    sft(alone, tmp_path / "one")
    shared = changed(alone, **{"distributed.context_parallel_size": 2})
    codes = run_sft_on_ranks(shared, tmp_path / "two", world_size=2)
    assert codes == [0, 0], error(tmp_path / "two")
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_four_ranks_in_two_groups_train_what_one_does(config: dict[str, Any], tmp_path: Path):
    """One group has as few key-value heads as processes, the other rows of its own."""
    sft(config, tmp_path / "one")
    shared = changed(config, **SHARED)
    codes = run_sft_on_ranks(shared, tmp_path / "four", world_size=4)
    assert codes == [0] * 4, error(tmp_path / "four")
    check_same(tmp_path / "one", tmp_path / "four")
    of_four = changed(config, distributed={"context_parallel_size": 4})
    codes = run_sft_on_ranks(of_four, tmp_path / "parts", world_size=4)
    assert codes == [0] * 4, error(tmp_path / "parts")
    check_same(tmp_path / "one", tmp_path / "parts")


@pytest.mark.long
def test_shared_rows_killed_and_resumed_end_in_the_same_bytes(
    config: dict[str, Any], tmp_path: Path
):
    settings = {"checkpointing.save_steps": 2, "sft.packing": "bfd", **SHARED}
    shared = changed(config, **settings)
    assert run_sft_on_ranks(shared, tmp_path / "whole", world_size=2) == [0, 0]
    point = "before the random state is saved"
    assert -9 in run_sft_on_ranks(shared, tmp_path / "killed", world_size=2, kill_at=point)
    assert run_sft_on_ranks(shared, tmp_path / "killed", world_size=2, resuming=True) == [0, 0]
    assert hash_files(tmp_path / "killed/model") == hash_files(tmp_path / "whole/model")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def error(run_dir: Path) -> str:
    file = rank_file(run_dir, 0, "error")
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize(
    ("model_type", "settings", "size", "line"),
    [
        ("llama", {}, 3, r"must divide the model's 4 attention heads \(got 3\)"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3}, 2,
         r"must divide the model's 3 key-value heads, or be a multiple of them \(got 2\)"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, 2,
         r"models of the type lfm2 have layers that mix tokens outside of attention \(conv\)"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, 2,
         "the router's auxiliary loss is of whole rows"),
    ],
)  # fmt: skip
def test_model_that_cannot_share_rows_is_refused(
    model_type: str, settings: dict[str, Any], size: int, line: str
):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
             "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**shape, **ids, **settings}), dtype=torch.float32
    )
    with pytest.raises(PostTrainingError, match=f"distributed.context_parallel_size: {line}"):
        share_rows(made, RowPart(size, 0, None))
