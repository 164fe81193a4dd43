"""The model that is trained, read and checked against what it is trained on."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError, UsageError
from post_training.models.adapter import add_adapter, coverage, merge_adapter, save_adapter
from post_training.models.attention import check_attention, check_packing, check_positions
from post_training.models.load import check_vocabulary, load_model, read_model_settings
from post_training.stages.context import StageContext
from post_training.train.config import TrainingStageConfig


def load_policy(
    config: TrainingStageConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    where: str,
) -> PreTrainedModel:
    """longest: sequence, in tokens. where: what says so.

    Errors: PostTrainingError when the model can't have such sequences, tokens or rows.
    """
    model = load_model(
        config.model.path,
        dtype=config.model.dtype,
        attn_implementation=config.model.attn_implementation,
    )
    if model.config.get_text_config() is not model.config:
        raise PostTrainingError(
            f"it is loaded as a model of more than text, {type(model).__name__}, which can't be "
            "trained here",
            where=str(config.model.path),
        )
    check_vocabulary(model, tokenizer)
    on_cpu = config.model.attn_implementation in ("eager", "sdpa")
    if on_cpu and (config.rows_are_packed or config.training.padding_free):
        check_packing(model)
    check_positions(model.config, longest, where=where)
    return model


# Training with LoRA instead of the whole model, where the configuration has a `lora` block.


ADAPTER = "adapter"


def to_be_trained(config: TrainingStageConfig, model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a peft.PeftModel around it. Errors: UsageError for a wrong target."""
    if config.lora is None:
        return model
    return add_adapter(
        model,
        **config.lora.model_dump(),
        seed=config.seed,
        in_float32=config.distributed.strategy != "zero3",
    )


def trained(
    config: TrainingStageConfig,
    model: PreTrainedModel,
    adapter: Path,
    weights: dict[str, Tensor] | None,
) -> PreTrainedModel:
    """What `to_be_trained` became, as a plain model; for rank 0 alone.

    weights: gathered from where they were sharded; None: the model's own.
    With LoRA the adapter is saved as the folder `adapter`, then merged into the model it was
    trained on, read once more: so the sum is made from files, however training was distributed.
    """
    if config.lora is None:
        return model
    save_adapter(adapter, model, weights)
    with _whole_on_this_rank():
        base = load_model(
            config.model.path,
            dtype=config.model.dtype,
            attn_implementation=config.model.attn_implementation,
        )
        return merge_adapter(base, adapter)


def adapter_figures(
    config: TrainingStageConfig, model: PreTrainedModel, context: StageContext
) -> dict[str, int]:
    """For the record, and told: which matrices have an adapter, and which have none."""
    if config.lora is None:
        return {}
    found = coverage(model)
    context.log(f"lora: {found}")
    return {
        **{f"lora/adapted/{kind}": number for kind, number in found.adapted.items()},
        **{f"lora/plain/{kind}": number for kind, number in found.plain.items()},
    }


@contextmanager
def _whole_on_this_rank() -> Iterator[None]:
    """transformers would divide a model among all the ranks, of which only this one reads it."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def artifacts(config: TrainingStageConfig) -> dict[str, str]:
    """{kind: folder} of the run."""
    return {"model": "model", **({} if config.lora is None else {"adapter": ADAPTER})}


# What settings need of the machine, found out before any data is prepared.


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
