"""The model that is trained: what it needs of the machine, how it is read, and its adapter.

With a `lora` block a low-rank adapter is trained in place of the model, and merged into it at the
end. Otherwise the model itself is.
"""

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
from post_training.models.head import ChunkedHead
from post_training.models.left_out import describe_left_out
from post_training.models.load import check_vocabulary, load_model, read_model_settings
from post_training.models.logits import slower_float32_logits
from post_training.stages.context import StageContext
from post_training.train.config import TrainingStageConfig

ADAPTER = "adapter"


def check_requirements(config: TrainingStageConfig) -> None:
    """What settings need of the machine, found out before any data is prepared.

    Errors: UsageError, one line, for the first setting that can't be had here.
    """
    training = config.training
    check_attention(
        config.model.attn_implementation,
        computes_in_16_bits=config.computes_in_16_bits,
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


def load_policy(
    config: TrainingStageConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    where: str,
) -> PreTrainedModel:
    """Read the language model that is trained, and compare it with the data.

    longest: sequence of the data, in tokens.
    where: what says so, for the error.
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
    if config.rows_are_packed or config.training.padding_free:
        check_packing(model)
    check_positions(model.config, longest, where=where)
    return model


def check_read(config: TrainingStageConfig, context: StageContext, model: PreTrainedModel) -> None:
    """After the model was read: say what its folder holds beside it. Every rank calls it.

    Errors: PostTrainingError when an input of the run changed while it was read.
    """
    context.on_writer(context.inputs.check)
    if (left_out := describe_left_out(model, config.model.path)) is not None:
        context.log(f"warning: {left_out}; they are not trained")


def install_head(
    config: TrainingStageConfig, context: StageContext, model: PreTrainedModel
) -> ChunkedHead:
    """The output layer by which the loss is computed; of the model itself, before `add_lora`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.model.float32_logits and (slower := slower_float32_logits(device)):
        context.log(slower)
    return ChunkedHead.install(model, float32_logits=config.model.float32_logits)


def add_lora(config: TrainingStageConfig, model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a peft.PeftModel around it. Errors: UsageError for a wrong target."""
    if config.lora is None:
        return model
    return add_adapter(
        model,
        **config.lora.model_dump(),
        seed=config.seed,
        in_float32=config.distributed.strategy != "zero3",
    )


def export_model(
    config: TrainingStageConfig,
    model: PreTrainedModel,
    adapter: Path,
    weights: dict[str, Tensor] | None,
) -> PreTrainedModel:
    """What `add_lora` became in training, as a plain model; for rank 0 alone.

    With LoRA the adapter is written to the folder `adapter`, then merged into the model it was
    trained on, which is read once more: so the sum is made from files, however training was
    distributed.

    weights: gathered from where they were sharded; None: the model's own.
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


@contextmanager
def _whole_on_this_rank() -> Iterator[None]:
    """transformers would divide a model among all the ranks, of which only this one reads it."""
    # The only switch it has: whether its memory of a DeepSpeed configuration is empty.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def describe_adapter(
    config: TrainingStageConfig, model: PreTrainedModel, context: StageContext
) -> dict[str, int]:
    """For the record, and told: how many matrices of each kind have an adapter, how many none."""
    if config.lora is None:
        return {}
    found = coverage(model)
    context.log(f"lora: {found}")
    return {
        **{f"lora/adapted/{kind}": number for kind, number in found.adapted.items()},
        **{f"lora/plain/{kind}": number for kind, number in found.plain.items()},
    }


def artifacts(config: TrainingStageConfig) -> dict[str, str]:
    """{kind: folder} of the run."""
    return {"model": "model", **({} if config.lora is None else {"adapter": ADAPTER})}
