"""The configuration of `entrypoint init-model`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from post_training.config.model import Role
from post_training.data.config import TEMPLATES
from post_training.stages.config import StageConfig


class InitModelConfig(StageConfig):
    """corpus: JSONL files; the tokenizer is trained on every string in them."""

    architecture: Literal["llama", "apertus"]
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool = False
    corpus: Annotated[list[Path], Role.INPUT, Field(min_length=1)]
    chat_template: Literal[TEMPLATES] = "chatml"

    @model_validator(mode="after")
    def _sizes_fit(self) -> "InitModelConfig":
        # An odd head size has no rotary halves; the others are divided among the heads.
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 × num_attention_heads "
                f"= {2 * self.num_attention_heads} (got {self.hidden_size})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads "
                f"= {self.num_key_value_heads} (got {self.num_attention_heads})"
            )
        return self
