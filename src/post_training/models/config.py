"""Which model, and how it computes: the `model` block of every stage that loads one."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from post_training.config.latest import newest_checkpoint
from post_training.config.model import ADDED_LATER, Config, Role

Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
TrainingAttention = Literal["sdpa", "eager", "varlen", "flash_attention_2", "flex_attention"]


class ModelConfig(Config):
    """A model, and how it computes."""

    path: Annotated[Path, Role.INPUT, AfterValidator(newest_checkpoint)] = Field(
        description="Model folder, as transformers saves it: weights, config.json and tokenizer. "
        "Or the folder above it, whose file `latest` names it."
    )
    attn_implementation: Annotated[Attention, Role.TOPOLOGY] = Field(
        "sdpa",
        description="How attention is computed. sdpa and eager work everywhere; the others need a "
        "GPU, and flash_attention_2 also 16 bits and the package flash-attn.",
    )
    # The optimizer's averages have the dtype of the weights. bfloat16 has 8 bits of precision, and
    # an average with a decay of 0.999 moves by less than the last of them.
    dtype: Annotated[Literal["float32", "bfloat16"], Role.TOPOLOGY] = Field(
        "float32",
        description="dtype of the weights. For training, float32 with training.mixed_precision: "
        "bf16 is safe; in bfloat16 slow averages of the optimizer stand still. ZeRO keeps float32 "
        "copies in any case.",
    )


class ScoredModelConfig(ModelConfig):
    """A model whose log-probabilities are computed."""

    float32_logits: Annotated[bool, Role.TOPOLOGY, ADDED_LATER] = Field(
        False,
        description="Where matrix products are of bfloat16, keep the logits in float32 instead of "
        "rounding them to bfloat16: log-probabilities are then more exact. It costs little on GPUs "
        "of NVIDIA; elsewhere it is slower, and the run says so.",
    )


def check_float32_logits(model: ScoredModelConfig, *, computes_in_16_bits: bool) -> None:
    """Errors: ValueError where float32_logits changes nothing."""
    if model.float32_logits and not computes_in_16_bits:
        raise ValueError(
            "model.float32_logits: logits are float32 already (it is for model.dtype: bfloat16, or "
            "for training.mixed_precision: bf16)"
        )


class TrainedModelConfig(ScoredModelConfig):
    """A model that is trained. It can have an attention that takes whole rows only."""

    attn_implementation: Annotated[TrainingAttention, Role.TOPOLOGY] = Field(
        "sdpa",
        description="How attention is computed. sdpa and eager work everywhere. varlen too: it "
        "computes each sequence of a packed row by itself, on GPUs by PyTorch's own "
        "FlashAttention, in 16 bits. flex_attention needs a GPU, and flash_attention_2 also 16 "
        "bits and the package flash-attn.",
    )
