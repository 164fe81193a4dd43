"""What the libraries are told: the Trainer's arguments, how training is divided among the
processes, and the optimizer.

What divides the training (DeepSpeed or FSDP2) is also written to RUN/deepspeed.json or
RUN/fsdp.json.
"""

import os
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, TrainingArguments
from trl import SFTConfig

from post_training.core.errors import UsageError
from post_training.models.context_parallel import RowPart
from post_training.stages.context import Ranks
from post_training.train.config import TrainingStageConfig
from post_training.train.optim import transformers_arguments
from post_training.train.training_config import TrainingConfig, merge_deepspeed

# Our losses are computed on the output layer in chunks, and need its plain forward.
LIGER = {"fused_linear_cross_entropy": False, "cross_entropy": False}
# Elements in a bucket of gradients: DeepSpeed's default. A constant, so that the order of sums does
# not hang on the size of the model.
_BUCKET = 500_000_000
# On LUMI (edf/lumi.toml) a second group of all ranks hung in 13 of 17 tries from 4 nodes on:
# https://github.com/lumi-ai-factory/laifs-container-recipes/issues/44. The bits are the same.
ONE_GROUP_VARIABLE = "POST_TRAINING_ONE_PROCESS_GROUP"
# What a launcher sets. Port 0: whichever is free.
_ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "GLOO_SOCKET_IFNAME": "lo",  # the machine's own name need not resolve
}


def training_arguments(
    config: TrainingStageConfig, output_dir: Path, num_steps: int, num_accumulated: int
) -> SFTConfig:
    """All that the library's Trainer is told.

    output_dir: where it writes checkpoints.
    num_steps: of the whole run.
    num_accumulated: micro-batches that each process adds up for a step.
    Errors: UsageError when the schedule does not fit into the run.
    """
    training = config.training
    on_cpu = not torch.cuda.is_available()
    fsdp = fsdp_arguments(config)
    # With FSDP it is done for whole units, and by it.
    checkpoints_activations = training.gradient_checkpointing and not fsdp
    try:
        schedule = transformers_arguments(
            training.lr_scheduler_type,
            training.lr_scheduler_kwargs,
            training.warmup,
            training.iteration_offset + num_steps,
        )
    except ValueError as error:
        raise UsageError(str(error), where="training") from None
    if training.torch_compile:
        # One graph for all lengths: else the first batch has one of its own, and the first batch
        # of a resumed run is another.
        os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"
    arguments = SFTConfig(
        output_dir=str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=num_accumulated,
        gradient_checkpointing=checkpoints_activations,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpoints_activations else None,
        deepspeed=deepspeed_config(config, num_accumulated),
        **fsdp,
        bf16=training.mixed_precision == "bf16",
        torch_compile=training.torch_compile,
        use_liger_kernel=training.use_liger_kernel,
        liger_kernel_config=LIGER if training.use_liger_kernel else None,
        learning_rate=training.learning_rate,
        **schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=on_cpu,
        # Prepared rows: token ids and labels, cut to their length. TRL has nothing to do.
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,  # the rows' numbers are no argument of the model
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
        # Every checkpoint is whole: optimizer, schedule and random states too.
        save_strategy="steps",
        save_steps=config.checkpointing.save_steps,
        save_total_limit=None,  # checkpoint.py does it
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one device, however many it sees
    return arguments


def deepspeed_config(config: TrainingStageConfig, num_accumulated: int) -> dict[str, Any] | None:
    """What DeepSpeed is told; None where another strategy is asked for.

    With ZeRO the update is made inside the backward pass of the last micro-batch; a loss that is
    not finite is found out just after it, and the run ends before anything of it is saved.

    Source: https://www.deepspeed.ai/docs/config-json/
    """
    distributed, training = config.distributed, config.training
    if not distributed.is_zero:
        return None
    stage = int(distributed.strategy.removeprefix("zero"))
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        # The sums would be the same, but for when they are read: determinism before speed.
        "overlap_comm": False,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if stage == 3:
        # The model that is saved is whole; transformers reads it without DeepSpeed.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if distributed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if distributed.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    own = {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": num_accumulated,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.mixed_precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # in bfloat16 small gradients would vanish
        "zero_optimization": zero,
        # The optimizer is the one of the settings, whatever DeepSpeed knows of it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return merge_deepspeed(own, distributed.deepspeed_config or {})


def strategy_settings(arguments: TrainingArguments) -> dict[str, dict[str, Any]]:
    """{name of a file in RUN: what the library that divides the training is told}; empty with
    ddp."""
    told = {"deepspeed.json": arguments.deepspeed, "fsdp.json": arguments.fsdp_plugin_args}
    return {name: settings for name, settings in told.items() if settings is not None}


def join_ranks(config: TrainingStageConfig) -> None:
    """Initialise torch.distributed where it isn't: before the libraries look for other processes.

    A process alone has no launcher that says so: DeepSpeed would look for MPI, and FSDP would not
    divide anything.
    """
    if config.distributed.strategy == "ddp":
        return
    if not dist.is_initialized():
        os.environ |= {name: value for name, value in _ALONE.items() if name not in os.environ}
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if config.distributed.is_zero:
        import deepspeed

        with redirect_stdout(StringIO()):  # it says there that its operators are compiled
            deepspeed.init_distributed(verbose=False)
        if os.environ.get(ONE_GROUP_VARIABLE) == "1":
            from deepspeed.utils import groups

            # Where it is not set, ZeRO makes a second group of all ranks, a copy of the first.
            groups._WORLD_GROUP = dist.group.WORLD


def join_row_group(config: TrainingStageConfig, ranks: Ranks) -> RowPart | None:
    """Which part of its rows this rank has, where neighbouring ranks share them; None where each
    has whole ones. Every rank calls it."""
    size = config.distributed.context_parallel_size
    if size == 1:
        return None
    # Every rank makes every group: torch.distributed wants it so.
    groups = [
        dist.new_group(list(range(first, first + size)))
        for first in range(0, ranks.world_size, size)
    ]
    return RowPart(size, ranks.rank % size, groups[ranks.rank // size])


def row_groups(config: TrainingStageConfig, ranks: Ranks) -> Ranks:
    """This rank's group among the groups that have rows of their own, as if each were one rank."""
    size = config.distributed.context_parallel_size
    return replace(ranks, rank=ranks.rank // size, world_size=ranks.world_size // size)


def fsdp_arguments(config: TrainingStageConfig) -> dict[str, Any]:
    """Arguments of the Trainer: every transformer block is a unit; checkpoints are sharded, and
    models saved whole. Source: transformers, TrainingArguments.fsdp_config."""
    if config.distributed.strategy != "fsdp2":
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_offload": config.distributed.offload == "parameters",
            "activation_checkpointing": config.training.gradient_checkpointing,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }


def optimizer_class_and_arguments(
    training: TrainingConfig, num_steps: int
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that the settings name, as the Trainer wants it.

    The Trainer gives it two groups of parameters, with and without weight decay. Each optimizer's
    state survives a checkpoint bit for bit (tests/stack/train/test_optimizers.py).

    num_steps: of the whole run.
    """
    name, settings = training.optimizer, dict(training.optimizer_args)
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    match name:
        case "adamw":
            found, fixed = torch.optim.AdamW, {"fused": True}
        case "adamw_torch":
            found, fixed = torch.optim.AdamW, {"fused": False}
        case "ademamix":
            from pytorch_optimizer import AdEMAMix  # 1.3 s, so only where it is used

            found, fixed = AdEMAMix, {"weight_decouple": True}
            settings["betas"] = (*settings["betas"], settings.pop("beta3"))
            settings.setdefault("t_alpha_beta3", num_steps)
        case "lion":
            from pytorch_optimizer import Lion

            found, fixed = Lion, {"weight_decouple": True}
        case "adafactor":
            # The learning rate is the schedule's.
            found, fixed = Adafactor, {"scale_parameter": False, "relative_step": False}
            settings["eps"] = tuple(settings["eps"])
        case "sgd":
            found, fixed = torch.optim.SGD, {}
        case "rmsprop":
            found, fixed = torch.optim.RMSprop, {}
        case "adagrad":
            found, fixed = torch.optim.Adagrad, {}
    return found, {"lr": training.learning_rate, **settings, **fixed}


def decayed_parameters(model: torch.nn.Module, chosen: list[str]) -> list[str]:
    """Those of the `chosen` names that are matrices: transformers leaves norms and biases out by
    their names, and would let the two numbers of each of Apertus's activations (xIELU) decay."""
    names = set(chosen)
    return [
        name
        for name, parameter in model.named_parameters()
        # Under ZeRO-3 a parameter is empty between uses, and this is what it really is.
        if name in names and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    ]


def share_defaults(optimizer: Any) -> None:
    """Give `defaults` of torch's optimizer to those that wrap it.

    DeepSpeed's have none, and schedules that end at a rate (polynomial, min_lr) read the first rate
    there.
    """
    wrappers = [optimizer]
    while (inner := getattr(wrappers[-1], "optimizer", None)) is not None:
        wrappers.append(inner)
    for wrapper, wrapped in reversed(list(pairwise(wrappers))):
        if hasattr(wrapped, "defaults") and not hasattr(wrapper, "defaults"):
            wrapper.defaults = wrapped.defaults


def start_schedule_at(scheduler: LambdaLR, step: int) -> None:
    """As though `step` steps had been made: the coming one has the rate of that place.

    All of transformers' schedules that optim.py has are functions of the number of steps made. That
    is in the scheduler's state, so a resumed run goes on from it.
    """
    # What its step(epoch) does, without the warning that epochs are no longer given.
    scheduler._update_lr(step)
