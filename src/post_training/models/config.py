"""Which model, and how it computes: the `model` block of every stage that loads one."""

from pathlib import Path
from typing import Annotated, Literal

from post_training.config.model import Config, Role

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


class ModelConfig(Config):
    """path: a model folder, as transformers saves it.

    dtype: of the weights. In bfloat16 the optimizer's averages are bfloat16 too, and one with a
    decay of 0.999 then stands still: float32 with training.mixed_precision: bf16 is safer. The
    ZeRO strategies keep float32 copies, whatever this says.
    """

    path: Annotated[Path, Role.INPUT]
    attn_implementation: Annotated[Attention, Role.TOPOLOGY] = "sdpa"
    dtype: Annotated[Literal["float32", "bfloat16"], Role.TOPOLOGY] = "float32"
