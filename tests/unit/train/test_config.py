"""The settings of training: what is refused, and what they come to."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from post_training.config.model import Role, settings_by_role
from post_training.core.errors import UsageError
from post_training.train.config import DpoConfig, SftConfig
from post_training.train.training_config import TrainingConfig, accumulation_steps

COUNTS = {"num_rows": 30, "num_sequences": 90, "num_tokens": 12_000}


def training(**settings: Any) -> TrainingConfig:
    given = {"effective_batch_size": 4, "learning_rate": 1e-3, "max_steps": 10, **settings}
    return TrainingConfig.model_validate({k: v for k, v in given.items() if v is not None})


def sft(packing: str = "bfd", model: dict[str, Any] | None = None, **blocks: Any) -> SftConfig:
    return SftConfig.model_validate(
        {
            "model": {"path": "model", **(model or {})},
            "training": training().model_dump(),
            "data": {"prepared": "data"},
            "sft": {"max_seq_length": 512, "packing": packing},
            **blocks,
        }
    )


def refusal(make: Any, **settings: Any) -> str:
    with pytest.raises(ValidationError) as error:
        make(**settings)
    return str(error.value)


# Length of the run


def test_duration_none_is_refused_with_the_choices():
    assert (
        "set exactly one of max_steps, num_train_epochs, num_training_samples, "
        "num_training_tokens (got none)" in refusal(training, max_steps=None)
    )


def test_duration_two_are_refused_by_name():
    found = refusal(training, num_training_samples=3)
    assert "(got max_steps and num_training_samples)" in found


@pytest.mark.parametrize(
    ("duration", "num_steps"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2}, 15),  # 60 rows in fours
        ({"num_train_epochs": 0.1}, 1),  # 3 rows; the batch is filled up
        ({"num_training_samples": 90}, 8),  # one epoch: 7.5 batches
        ({"num_training_samples": 12}, 1),  # 4 rows of 3 sequences
        ({"num_training_samples": 13}, 2),
        ({"num_training_tokens": 16_000}, 10),  # 40 rows of 400 tokens
        ({"num_training_tokens": 16_001}, 11),
    ],
)
def test_num_steps_from_the_prepared_rows_is_exact(duration: dict[str, Any], num_steps: int):
    settings = training(**{"max_steps": None, **duration})
    assert settings.num_steps(COUNTS) == num_steps


def test_num_steps_of_decimal_epochs_are_not_rounded_up_by_floats():
    assert 0.07 * 100 > 7
    settings = training(max_steps=None, num_train_epochs=0.07, effective_batch_size=1)
    assert settings.num_steps({**COUNTS, "num_rows": 100}) == 7


def test_num_training_tokens_of_rows_that_are_not_packed_is_refused():
    tokens = training(max_steps=None, num_training_tokens=1000).model_dump()
    assert sft(training=tokens).training.num_training_tokens == 1000
    found = refusal(sft, packing="none", training=tokens)
    assert "training.num_training_tokens: needs packed rows" in found


# The global batch


@given(micro=st.integers(1, 12), processes=st.integers(1, 40), effective=st.integers(1, 2000))
def test_accumulation_is_exact_or_refused_with_the_nearest_possible_batches(
    micro: int, processes: int, effective: int
):
    def steps(batch: int) -> int:
        settings = training(effective_batch_size=batch, per_device_train_batch_size=micro)
        return accumulation_steps(settings, processes)

    possible = range(micro * processes, effective + micro * processes + 1, micro * processes)
    if effective in possible:
        assert steps(effective) * micro * processes == effective
        return
    with pytest.raises(UsageError) as error:
        steps(effective)
    assert str(error.value).startswith("training: effective_batch_size must be a multiple of ")
    nearest = [int(number) for number in re.findall(r"\d+", str(error.value).split("nearest:")[1])]
    below = [batch for batch in possible if batch < effective]
    above = [batch for batch in possible if batch > effective]
    assert nearest == [*below[-1:], *above[:1]]
    assert all(steps(batch) >= 1 for batch in nearest)


def test_check_ranks_names_what_the_processes_really_are():
    odd = training(effective_batch_size=9, per_device_train_batch_size=3).model_dump()
    sft(training=odd).check_ranks(3)
    with pytest.raises(UsageError, match=r"= 3 × 2 \(got 9; nearest: 6 or 12\)"):
        sft(training=odd).check_ranks(2)


# Schedules


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lr_scheduler_type": "constant", "warmup": 5}, "constant has no warmup"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0.1}},
         "cosine takes num_cycles (got min_lr)"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "linear takes none (got power)"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr_rate or min_lr"),
        ({"lr_scheduler_type": "cosine_with_min_lr",
          "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0}}, "and not both"),
        ({"lr_scheduler_type": "cosine_with_min_lr",
          "lr_scheduler_kwargs": {"min_lr_rate": 1.5}}, "min_lr_rate: must be <= 1 (got 1.5)"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
         "lr_scheduler_kwargs.min_lr: must be < learning_rate, 0.001 (got 0.001)"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.1}},
         "lr_scheduler_kwargs.lr_end: must be < learning_rate, 0.001 (got 0.1)"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "2"}},
         "polynomial: power: must be a number (got '2')"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps: missing"),
        ({"lr_scheduler_type": "warmup_stable_decay",
          "lr_scheduler_kwargs": {"num_decay_steps": 2.5}},
         "num_decay_steps: must be whole steps, or a share < 1 (got 2.5)"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "Input should be"),
        ({"warmup": 1.5}, "warmup: must be whole steps, or a share < 1 (got 1.5)"),
    ],
)  # fmt: skip
def test_schedule_that_cannot_be_meant_is_refused(settings: dict[str, Any], problem: str):
    assert problem in refusal(training, **settings)


def test_schedule_settings_are_recorded_with_their_defaults():
    assert training(lr_scheduler_type="cosine").lr_scheduler_kwargs == {"num_cycles": 0.5}
    settings = {"min_lr_rate": 0.1}
    found = training(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=settings)
    assert found.lr_scheduler_kwargs == {"min_lr_rate": 0.1, "num_cycles": 0.5}
    assert TrainingConfig.model_validate(found.model_dump()) == found


# Optimizers


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"optimizer": "adamw_8bit"}, "Input should be 'adamw'"),
        ({"optimizer": "adam"}, "Input should be 'adamw'"),
        ({"optimizer_args": {"beta3": 0.9}}, "adamw takes betas, eps (got beta3)"),
        ({"optimizer_args": {"betas": [0.9]}}, "adamw: betas[1]: missing"),
        ({"optimizer_args": {"betas": [0.9, 1.0]}}, "betas[1]: must be < 1 (got 1.0)"),
        ({"optimizer_args": {"eps": 0}}, "adamw: eps: must be > 0 (got 0)"),
        ({"optimizer": "ademamix", "optimizer_args": {"beta3": 0.5}},
         "ademamix: betas[0]: must be > 0 and <= beta3 (got 0.9)"),
        ({"optimizer": "sgd", "optimizer_args": {"nesterov": True}}, "needs a momentum > 0"),
    ],
)  # fmt: skip
def test_optimizer_that_cannot_be_meant_is_refused(settings: dict[str, Any], problem: str):
    assert problem in refusal(training, **settings)


def test_optimizer_settings_are_recorded_with_their_defaults():
    found = training(optimizer="ademamix", optimizer_args={"alpha": 5})
    assert found.optimizer_args == {
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "beta3": 0.999,
        "alpha": 5.0,
    }


def test_optimizer_with_two_names_is_one_in_the_recipe():
    assert training(optimizer="adamw_torch_fused") == training(optimizer="adamw")


def test_ademamix_with_weights_in_bfloat16_is_refused_but_for_zero():
    blocks = {
        "training": training(optimizer="ademamix", mixed_precision="bf16").model_dump(),
        "model": {"dtype": "bfloat16"},
    }
    assert "model.dtype: ademamix's slow average" in refusal(sft, **blocks)
    assert sft(distributed={"strategy": "zero2"}, **blocks).model.dtype == "bfloat16"


def test_zero_with_weights_in_bfloat16_needs_mixed_precision():
    found = refusal(sft, model={"dtype": "bfloat16"}, distributed={"strategy": "zero1"})
    assert "model.dtype: ZeRO with weights in bfloat16 needs training.mixed_precision" in found


def test_adafactor_under_zero_is_refused():
    adafactor = training(optimizer="adafactor").model_dump()
    found = refusal(sft, training=adafactor, distributed={"strategy": "zero3"})
    assert "training.optimizer: adafactor works on whole matrices" in found


# Distribution, LoRA, roles


@pytest.mark.parametrize(
    ("strategy", "allowed"),
    [
        ("ddp", {"none"}),
        ("zero1", {"none", "optimizer"}),
        ("zero2", {"none", "optimizer"}),
        ("zero3", {"none", "optimizer", "parameters"}),
        ("fsdp2", {"none", "parameters"}),
    ],
)
def test_offload_of_what_a_strategy_does_not_divide_is_refused(strategy: str, allowed: set[str]):
    for offload in ("none", "optimizer", "parameters"):
        block = {"strategy": strategy, "offload": offload}
        if offload in allowed:
            assert sft(distributed=block).distributed.offload == offload
        else:
            assert f"offload: {strategy} can have none" in refusal(sft, distributed=block)


@pytest.mark.parametrize(
    "block", [{"rank": 0}, {"alpha": 0}, {"dropout": 1}, {"target_modules": []}, {"r": 8}]
)
def test_lora_that_cannot_be_meant_is_refused(block: dict[str, Any]):
    refusal(sft, lora=block)


def test_float32_logits_are_refused_where_they_are_float32_already():
    wanted = {"float32_logits": True}
    assert "model.float32_logits: logits are float32 already" in refusal(sft, model=wanted)
    assert sft(model={**wanted, "dtype": "bfloat16"}).model.float32_logits
    assert sft(model=wanted, training=training(mixed_precision="bf16").model_dump())


def test_float32_logits_left_out_are_no_part_of_what_is_compared():
    in_16_bits = {"dtype": "bfloat16"}
    settings = settings_by_role(sft(model=in_16_bits))
    assert not [key for keys in settings.values() for key in keys if "float32_logits" in key]
    changed = settings_by_role(sft(model={**in_16_bits, "float32_logits": True}))
    assert changed[Role.TOPOLOGY] == {**settings[Role.TOPOLOGY], "model.float32_logits": True}
    assert changed[Role.RECIPE] == settings[Role.RECIPE]


VARLEN = {"attn_implementation": "varlen"}
SHARED = {"context_parallel_size": 2}


def test_rows_are_shared_by_processes_that_their_number_divides():
    of_four = training(effective_batch_size=2).model_dump()
    config = sft(model=VARLEN, distributed=SHARED, training=of_four)
    config.check_ranks(4)
    with pytest.raises(UsageError, match=r"must divide the number of processes, 3 \(got 2\)"):
        config.check_ranks(3)
    with pytest.raises(UsageError, match=r"= 1 × 4 \(got 2; nearest: 4\)"):
        config.check_ranks(8)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "needs model.attn_implementation: varlen (got sdpa)"),
        ({"model": VARLEN, "loss": {"name": "irl"}}, "not with loss.name: irl"),
        ({"model": VARLEN, "training": training(torch_compile=True).model_dump()},
         "not with training.torch_compile"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_shared_are_refused(settings: dict[str, Any], problem: str):
    found = refusal(sft, distributed=SHARED, **settings)
    assert f"distributed.context_parallel_size: {problem}" in found


def test_pairs_are_not_shared_by_processes():
    settings = {
        "model": {"path": "model", **VARLEN},
        "training": training().model_dump(),
        "data": {"prepared": "data"},
        "dpo": {"max_prompt_length": 8, "max_completion_length": 8},
        "loss": {"beta": 0.1},
    }
    DpoConfig.model_validate(settings)
    found = refusal(DpoConfig.model_validate, obj={**settings, "distributed": SHARED})
    assert "distributed.context_parallel_size: sft alone has it" in found


def test_processes_that_share_no_rows_leave_the_identity_as_it_was():
    keys = [settings_by_role(sft(model=VARLEN, distributed=each))[Role.TOPOLOGY].keys()
            for each in ({}, {"context_parallel_size": 1}, SHARED)]  # fmt: skip
    assert "distributed.context_parallel_size" not in keys[0] | keys[1]
    assert "distributed.context_parallel_size" in keys[2]


def test_settings_are_of_the_class_that_they_are():
    config = sft(lora={"rank": 8}, debug={"enabled": True})
    roles = {
        key.removesuffix("[0]"): role
        for role, settings in settings_by_role(config).items()
        for key in settings
    }
    for key in ("lora.rank", "lora.target_modules", "training.optimizer",
                "training.optimizer_args", "training.lr_scheduler_kwargs",
                "training.num_training_tokens", "training.effective_batch_size"):  # fmt: skip
        assert roles[key] == Role.RECIPE
    for key in ("model.dtype", "model.attn_implementation", "training.torch_compile",
                "training.use_liger_kernel", "training.padding_free",
                "training.per_device_train_batch_size", "training.gradient_checkpointing",
                "distributed.strategy", "distributed.offload"):  # fmt: skip
        assert roles[key] == Role.TOPOLOGY
    assert roles["debug.enabled"] == roles["debug.override_existing"] == Role.PLACEMENT


def test_override_existing_without_debug_is_refused():
    found = refusal(sft, debug={"override_existing": True})
    assert "override_existing: only with enabled: true" in found


# What a run folder keeps


@pytest.mark.parametrize("optimizer", ["adamw", "ademamix", "sgd"])
@pytest.mark.parametrize("loss", ["sft", "plw", "ln-plw", "irl"])
def test_resolved_config_with_every_default_written_out_is_read_again(loss: str, optimizer: str):
    config = sft(
        loss={"name": loss},
        training=training(optimizer=optimizer).model_dump(),
        evaluation={"prepared": "held-out"},
        lora={},
    )
    assert SftConfig.model_validate(config.model_dump(mode="json")) == config
