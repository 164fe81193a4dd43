"""The Trainer's arguments from our settings."""

import os
from pathlib import Path

import torch
from trl import SFTConfig

from post_training.core.errors import UsageError
from post_training.stages.training.config import TrainingStageConfig
from post_training.stages.training.distributed import deepspeed_config, fsdp_arguments
from post_training.stages.training.schedules import transformers_arguments

# Our losses are computed on the output layer in chunks, and need its plain forward.
_LIGER = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def training_arguments(
    config: TrainingStageConfig, output_dir: Path, num_steps: int, num_accumulated: int
) -> SFTConfig:
    """Errors: UsageError when the schedule does not fit into the run."""
    training = config.training
    on_cpu = not torch.cuda.is_available()
    fsdp = fsdp_arguments(config)
    # With FSDP it is done for whole units, and by it.
    checkpoints_activations = training.gradient_checkpointing and not fsdp
    try:
        schedule = transformers_arguments(
            training.lr_scheduler_type, training.lr_scheduler_kwargs, training.warmup, num_steps
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
        liger_kernel_config=_LIGER if training.use_liger_kernel else None,
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
        save_total_limit=None,  # checkpoints.py does it
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one device, however many it sees
    return arguments
