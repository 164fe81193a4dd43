"""What can't be had on a machine without a GPU is refused at once, in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft
from helpers.stage_process import run_sft_on_ranks
from post_training.core.errors import PostTrainingError, UsageError
from post_training.models.attention import (
    KEEP_PACKED_APART,
    check_left_out,
    check_packing,
    check_shared_prompt,
    seen_across,
)
from post_training.models.score import SharedPromptForward
from post_training.train.arguments import strategy_settings, training_arguments
from post_training.train.config import SftConfig
from post_training.train.policy import check_requirements

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@without_gpu
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"model.attn_implementation": "flash_attention_2"},
            "model.attn_implementation: flash_attention_2 trains on GPUs only, and there is none",
        ),
        (
            {"model.attn_implementation": "flex_attention"},
            "model.attn_implementation: flex_attention trains on GPUs only, and there is none",
        ),
        (
            {"training.use_liger_kernel": True},
            "training.use_liger_kernel: Liger's kernels run on GPUs only, and there is none here",
        ),
        (
            {"distributed": {"strategy": "fsdp2"}},
            "distributed.strategy: fsdp2 needs GPUs, and there is none here",
        ),
    ],
)
def test_setting_that_needs_a_gpu_is_refused_before_the_data(
    settings: dict[str, Any], line: str, config: dict[str, Any], tmp_path: Path
):
    with pytest.raises(UsageError) as refusal:
        sft(changed(config, **settings), tmp_path / "run")
    assert str(refusal.value).startswith(line)
    assert not (tmp_path / "run" / "data").exists()


def test_compiling_on_a_cpu_without_compiler_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = SftConfig.model_validate(changed(config, **{"training.torch_compile": True}))
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_requirements(settings)
    (tmp_path / "g++").unlink()
    with pytest.raises(UsageError, match=r"training.torch_compile: .* the compiler g\+\+"):
        check_requirements(settings)


@pytest.mark.parametrize("offload", ["none", "parameters"])
def test_fsdp2_is_what_accelerate_is_told_and_what_is_recorded(
    offload: str, config: dict[str, Any], tmp_path: Path
):
    """No machine of these tests can run it; what would be run is looked at."""
    settings = {"distributed": {"strategy": "fsdp2", "offload": offload}}
    settings["training.gradient_checkpointing"] = True
    model = SftConfig.model_validate(changed(config, **settings))
    arguments = training_arguments(model, tmp_path, 12, 1)
    assert arguments.gradient_checkpointing is False  # FSDP does it, for whole units
    [(name, told)] = strategy_settings(arguments).items()
    assert name == "fsdp.json"
    plugin = FullyShardedDataParallelPlugin(**json.loads(json.dumps(told)))
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == (offload == "parameters")


def test_activation_checkpoints_and_their_absence_train_alike(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    plain = changed(config, **{"model.path": str(model), "training.max_steps": 3})
    checkpointed = changed(plain, **{"training.gradient_checkpointing": True})
    sft(plain, tmp_path / "plain")
    sft(checkpointed, tmp_path / "checkpointed")
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "checkpointed")


def test_schedule_longer_than_the_run_is_refused(config: dict[str, Any], tmp_path: Path):
    settings = {
        "training.lr_scheduler_type": "warmup_stable_decay",
        "training.lr_scheduler_kwargs": {"num_decay_steps": 11},
    }
    with pytest.raises(UsageError, match="training: lr_scheduler_kwargs: 2 steps of warmup and 11"):
        sft(changed(config, **settings), tmp_path / "run")


def test_metrics_have_the_rates_of_the_schedule(config: dict[str, Any], tmp_path: Path):
    settings = {
        "training.lr_scheduler_type": "warmup_stable_decay",
        "training.lr_scheduler_kwargs": {"num_decay_steps": 4, "decay_type": "linear"},
        "logging.logging_steps": 1,
    }
    sft(changed(config, **settings), tmp_path / "run")
    shares = [0, 0.5, *[1] * 7, 0.75, 0.5, 0.25]
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.01 * share for share in shares])


@pytest.mark.parametrize(
    ("duration", "num_steps"),
    [
        ({"num_training_samples": 25}, 4),  # of 50 rows, in eights
        ({"num_train_epochs": 0.5}, 4),
        ({"num_train_epochs": 1}, 7),
    ],
)
def test_run_is_as_long_as_asked(
    duration: dict[str, Any], num_steps: int, config: dict[str, Any], tmp_path: Path
):
    of_training = {f"training.{key}": value for key, value in duration.items()}
    settings = {"training.max_steps": None, "training.warmup": 0, **of_training}
    assert sft(changed(config, **settings), tmp_path / "run").metrics["num_steps"] == num_steps


def test_run_of_tokens_ends_with_the_first_batch_that_reaches_them(
    config: dict[str, Any], tmp_path: Path
):
    settings = {
        "training.max_steps": None,
        "training.num_training_tokens": 1877,  # those of the 50 rows: one epoch of the packed ones
        "training.effective_batch_size": 4,
        "sft.packing": "bfd",
    }
    result = sft(changed(config, **settings), tmp_path / "run")
    assert result.metrics["num_steps"] == -(-result.metrics["num_rows"] // 4)


# Attention


def tiny(model_type: str, **settings: Any) -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64}
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **ids}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**shape, **settings}), attn_implementation="eager"
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", KEEP_PACKED_APART)
def test_packed_sequences_are_kept_apart_in_the_models_we_say(model_type: str, implementation: str):
    model = tiny(model_type, intermediate_size=32, num_key_value_heads=1).train()
    model.set_attn_implementation(implementation)
    assert seen_across(model) < 1e-5
    assert model.training


def test_packing_in_a_model_we_know_nothing_of_is_tried():
    model = tiny("gpt_neox", intermediate_size=32)
    assert model.config.model_type not in KEEP_PACKED_APART
    check_packing(model)
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks what it has divided
    with pytest.raises(PostTrainingError, match="gpt_neox aren't known to keep packed sequences"):
        check_packing(model)


@pytest.mark.parametrize("model_type", ["glm4", "gpt_neox"])
def test_packing_is_not_refused_for_rounding_in_16_bits(model_type: str):
    model = tiny(model_type, intermediate_size=32, num_key_value_heads=1, head_dim=8)
    model.set_attn_implementation("sdpa")
    check_packing(model.to(torch.bfloat16))


def test_packing_in_a_model_that_lets_sequences_see_each_other_is_refused():
    told = r"see each other in models .* opt: they change each other by \d+\.\d%"
    with pytest.raises(PostTrainingError, match=told):
        check_packing(tiny("opt", ffn_dim=32, word_embed_proj_dim=16))


def test_model_that_fails_in_a_trial_is_told_in_one_line():
    model = tiny("gpt_neox", intermediate_size=32)

    def fail(*_: Any) -> None:
        raise RuntimeError("expected a scalar type\nand more lines")

    model.gpt_neox.layers[1].register_forward_pre_hook(fail)
    line = "can't be tried in models of the type gpt_neox: RuntimeError: expected a scalar type"
    for check in (check_packing, check_shared_prompt):
        with pytest.raises(PostTrainingError) as refusal:
            check(model)
        assert refusal.value.problem.endswith(line)


def test_model_that_gives_no_numbers_is_not_packed():
    model = tiny("gpt_neox", intermediate_size=32)
    model.gpt_neox.layers[0].register_forward_hook(lambda *inputs: inputs[-1] * torch.nan)
    for check in (check_packing, check_shared_prompt):
        with pytest.raises(PostTrainingError, match="nan%"):
            check(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_packing_is_tried_whatever_the_attention_is(implementation: str):
    """Where the attention itself needs a GPU, too: flex_attention is not run here."""
    leaks = tiny("opt", ffn_dim=32, word_embed_proj_dim=16)
    apart = tiny("gpt_neox", intermediate_size=32)
    for model in (leaks, apart):
        model.config._attn_implementation = implementation
    with pytest.raises(PostTrainingError, match="see each other in models of the type opt"):
        check_packing(leaks)
    check_packing(apart)
    assert {model.config._attn_implementation for model in (leaks, apart)} == {implementation}


SMALL_EXPERTS = {
    "index_topk": 2048,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
}


CHUNKS = {"attention_chunk_size": 8192, "num_local_experts": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("model_type", "settings", "is_apart"),
    [
        ("llama4_text", CHUNKS, False),
        ("deepseek_v32", SMALL_EXPERTS, False),
        ("gpt_oss", {"sliding_window": 4096, **EXPERTS}, False),
        ("starcoder2", {"sliding_window": 4096}, True),
        ("exaone4", {"sliding_window": 4096}, True),
    ],
)
def test_packing_is_tried_beyond_the_window_of_a_model(
    model_type: str, settings: dict[str, Any], is_apart: bool
):
    model = tiny(model_type, intermediate_size=32, num_key_value_heads=2, **settings)
    for weights in model.parameters():
        weights.data.mul_(4)  # else what a token sees hardly shows
    before = json.dumps(model.config.to_dict(), default=str)
    assert seen_across(model) < 1e-4 if is_apart else seen_across(model) > 1e-2
    assert json.dumps(model.config.to_dict(), default=str) == before
    windows = {vars(part).get("sliding_window") for part in model.modules()}
    assert 3 not in windows


def test_packing_of_experts_is_not_refused_for_rounding():
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    model = tiny("qwen3_moe", intermediate_size=32, num_key_value_heads=1, **shape)
    assert seen_across(model) < 1e-4
    check_packing(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["glm4", "gpt_neox", "hunyuan_v1_dense"])
def test_shared_prompt_is_tried_in_a_model_we_know_nothing_of(model_type: str, implementation: str):
    model = tiny(model_type, intermediate_size=32, num_key_value_heads=1, head_dim=8)
    model.set_attn_implementation(implementation)
    check_shared_prompt(model)
    assert model.training


@pytest.mark.parametrize(
    ("model_type", "settings", "line"),
    [
        ("mistral", {"sliding_window": 4}, "some layers have a mask of their own"),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
            "router's auxiliary loss",
        ),
    ],
)
def test_shared_prompt_that_would_change_the_answers_is_refused(
    model_type: str, settings: dict[str, Any], line: str
):
    with pytest.raises(PostTrainingError, match=line):
        check_shared_prompt(tiny(model_type, **settings))


def test_shared_prompt_in_a_model_that_reads_no_positions_is_refused():
    model = tiny("gpt_neox", intermediate_size=32)
    for weights in model.parameters():
        weights.data.mul_(10)  # else what a token sees hardly shows
    check_shared_prompt(model)
    plain = model.forward
    model.forward = lambda **inputs: plain(**{**inputs, "position_ids": None})
    with pytest.raises(PostTrainingError, match="logits differ by"):
        check_shared_prompt(model)


@pytest.mark.parametrize(
    ("model_type", "settings", "kind"),
    [
        ("llama4_text", CHUNKS, "chunked_attention"),
        ("deepseek_v32", SMALL_EXPERTS, "indexed_attention"),
        ("mamba", {}, "linear_attention"),
    ],
)
def test_packing_in_a_model_whose_chunks_are_of_the_row_is_refused(
    model_type: str, settings: dict[str, Any], kind: str
):
    small = settings and {"intermediate_size": 32, "num_key_value_heads": 2, **settings}
    with pytest.raises(PostTrainingError, match=f"type {model_type} have layers .*{kind}"):
        check_packing(tiny(model_type, **small))


def folder_of(model_type: str, beside: Path, folder: Path, **settings: Any) -> Path:
    """A tiny model, with the tokenizer that is in another folder."""
    shutil.copytree(beside, folder)
    tiny(model_type, vocab_size=320, **settings).save_pretrained(folder)
    return folder


def test_model_whose_own_code_fails_in_training_is_told_in_one_line(
    model: Path, config: dict[str, Any], tmp_path: Path
):
    # 4 heads don't share 3 of keys and values, which nobody checks before they are multiplied.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 3, "intermediate_size": 32}
    folder = folder_of("llama", model, tmp_path / "llama", **heads)
    settings = {"model.path": str(folder)}
    with pytest.raises(PostTrainingError) as refusal:
        sft(changed(config, **settings), tmp_path / "run")
    assert str(refusal.value).startswith(f"{folder}: models of the type llama can't be used so: ")
    assert len(str(refusal.value).splitlines()) == 1


def test_model_without_a_part_below_its_output_layer_cannot_score(model: Path, tmp_path: Path):
    made = tiny("gpt2")
    made.base_model_prefix = "missing"
    with pytest.raises(UsageError, match="gpt2 can't be computed without their output"):
        SharedPromptForward(made, max_batch_tokens=64, prompts_per_batch=1)


@pytest.mark.parametrize(("implementation", "refused"), [("varlen", True),
                                                         ("flex_attention", True),
                                                         ("flash_attention_2", False),
                                                         ("sdpa", False)])  # fmt: skip
def test_dropout_that_an_implementation_would_leave_out_is_refused(
    implementation: str, refused: bool
):
    check_left_out(tiny("llama"), implementation)
    model = tiny("llama", attention_dropout=0.1)
    if not refused:
        check_left_out(model, implementation)
        return
    with pytest.raises(UsageError, match=f"{implementation} has no attention_dropout.* is 0.1"):
        check_left_out(model, implementation)


def test_packed_rows_are_trained_under_zero3_as_under_ddp(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    losses = []
    for strategy in ("zero3", "ddp"):
        settings = {
            "model.path": str(model),
            "distributed": {"strategy": strategy},
            "sft.packing": "bfd",
        }
        packed = changed(config, **settings)
        assert run_sft_on_ranks(packed, tmp_path / strategy, world_size=2) == [0, 0]
        losses.append([line["loss"] for line in metrics(tmp_path / strategy)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
