"""How training is divided among the processes, as the libraries that do it want to be told.

What they are told is written to RUN/deepspeed.json or RUN/fsdp.json. With ZeRO the update is made
inside the backward pass of the last micro-batch; a loss that is not finite is found out just after
it, and the run ends before anything of it is saved.
"""

import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from post_training.stages.training.config import TrainingStageConfig

# Elements in a bucket of gradients: DeepSpeed's default. A constant, so that the order of sums does
# not hang on the size of the model.
_BUCKET = 500_000_000
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


def deepspeed_config(config: TrainingStageConfig, num_accumulated: int) -> dict[str, Any] | None:
    """None where another strategy is asked for. Batches and clipping are those of the settings.

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
    return {
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


def strategy_settings(arguments: TrainingArguments) -> dict[str, dict[str, Any]]:
    """{name of a file: what the library that divides the training is told}; empty with ddp."""
    told = {"deepspeed.json": arguments.deepspeed, "fsdp.json": arguments.fsdp_plugin_args}
    return {name: settings for name, settings in told.items() if settings is not None}


def join_ranks(config: TrainingStageConfig) -> None:
    """To be called before the libraries look for each other's processes.

    A process alone has no launcher that says so. DeepSpeed would then look for MPI, and FSDP would
    not divide anything. It also tells stdout, when it is first used, that its operators are there.
    """
    if config.distributed.strategy == "ddp":
        return
    if not dist.is_initialized():
        os.environ |= {name: value for name, value in _ALONE.items() if name not in os.environ}
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if config.distributed.is_zero:
        import deepspeed

        with redirect_stdout(StringIO()):
            deepspeed.init_distributed(verbose=False)


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
