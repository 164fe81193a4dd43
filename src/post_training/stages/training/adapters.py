"""Training with LoRA instead of the whole model, where the configuration has a `lora` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed

from post_training.models.adapter import add_adapter, coverage, merge_adapter, save_adapter
from post_training.models.load import load_model
from post_training.stages.context import StageContext
from post_training.stages.training.config import TrainingStageConfig

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
