"""What settings need of the machine, found out before any data is prepared."""

import shutil
from importlib.util import find_spec

import torch

from post_training.core.errors import UsageError
from post_training.models.attention import check_attention
from post_training.models.load import read_model_settings
from post_training.stages.training.config import TrainingStageConfig


def check_requirements(config: TrainingStageConfig) -> None:
    """Errors: UsageError, one line, for the first setting that can't be had here."""
    training = config.training
    check_attention(
        config.model.attn_implementation,
        computes_in_16_bits=training.mixed_precision == "bf16" or config.model.dtype == "bfloat16",
        packed=config.rows_are_packed,
        rows_in_one=training.padding_free or training.per_device_train_batch_size == 1,
    )
    has_gpu = torch.cuda.is_available()
    if config.distributed.strategy == "fsdp2" and not has_gpu:
        raise UsageError(
            "fsdp2 needs GPUs, and there is none here (on CPUs it would become ddp)",
            where="distributed.strategy",
        )
    if config.distributed.is_zero:
        _need_package("deepspeed", "distributed.strategy", config.distributed.strategy)
    if training.use_liger_kernel:
        if not has_gpu:
            raise UsageError(
                "Liger's kernels run on GPUs only, and there is none here",
                where="training.use_liger_kernel",
            )
        _need_package("liger_kernel", "training.use_liger_kernel", "it")
        _check_liger_knows(read_model_settings(config.model.path).get("model_type"))
    if training.torch_compile and not has_gpu and shutil.which("g++") is None:
        raise UsageError(
            "on CPUs it needs the compiler g++, which is not installed",
            where="training.torch_compile",
        )


def _check_liger_knows(model_type: str | None) -> None:
    """Liger leaves a model that it doesn't know as it is, and tells nobody."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(
            f"Liger has no kernels for models of the type {model_type}",
            where="training.use_liger_kernel",
        )


def _need_package(package: str, key: str, what: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{what} needs {package}, which is not installed", where=key)
