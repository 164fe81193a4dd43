"""Which model, and how it computes: the `model` block of every stage that loads one."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from post_training.config.model import Config, Role

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


class ModelConfig(Config):
    """A model, and how it computes."""

    path: Annotated[Path, Role.INPUT] = Field(
        description="Model folder, as transformers saves it: weights, config.json and tokenizer."
    )
    attn_implementation: Annotated[Attention, Role.TOPOLOGY] = Field(
        "sdpa",
        description="How attention is computed. sdpa and eager work everywhere; the others need a "
        "GPU, and the flash ones 16 bits and their package.",
    )
    # The optimizer's averages have the dtype of the weights. bfloat16 has 8 bits of precision, and
    # an average with a decay of 0.999 moves by less than the last of them.
    dtype: Annotated[Literal["float32", "bfloat16"], Role.TOPOLOGY] = Field(
        "float32",
        description="dtype of the weights. For training, float32 with training.mixed_precision: "
        "bf16 is safe; in bfloat16 slow averages of the optimizer stand still. ZeRO keeps float32 "
        "copies in any case.",
    )
