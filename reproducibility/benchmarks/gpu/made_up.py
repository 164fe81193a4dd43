"""What the steps work on, made in memory: models with random weights, rows and pairs of random ids.

Nothing is read from a disk or a network, and nothing large is written: 8 billion weights are drawn
on the device in a second, where a model folder of them takes half a minute to write and to read.
Rows and pairs have the methods of the prepared datasets that the collators call.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[3]
CORPUS = REPOSITORY / "reproducibility/demo/arithmetic.jsonl"
_SHARED = {"max_position_embeddings": 8192, "tie_word_embeddings": False, "use_cache": False}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        **_SHARED,
    },
    "0.1B": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32_768,
        **_SHARED,
    },
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        **_SHARED,
    },
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        **_SHARED,
    },
}


def random_model(
    shape: dict[str, Any], device: str, dtype: torch.dtype, attention: str = "sdpa"
) -> Any:
    """A Llama whose weights are drawn on the device, from seed 0."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from post_training.models.varlen import register_varlen

    register_varlen()
    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        ).eval()


def tokenizer() -> Any:
    """The library's Trainer wants one. No row is made with it."""
    from post_training.data.chat.templates import MARKERS, template_text
    from post_training.data.sources.open import read_objects
    from post_training.models.save import train_tokenizer

    texts = (text for row in read_objects(CORPUS) for text in row.values())
    return train_tokenizer(texts, 512, MARKERS["chatml"], template_text("chatml"))


@dataclass(frozen=True)
class MadeUpRows:
    """Rows of random ids. lengths: of the sequences in each row, of which a third is prompt."""

    num_rows: int
    lengths: tuple[int, ...]
    vocab_size: int

    @property
    def counts(self) -> dict[str, int]:
        sequences = self.num_rows * len(self.lengths)
        tokens = self.num_rows * sum(self.lengths)
        return {"num_rows": self.num_rows, "num_sequences": sequences, "num_tokens": tokens}

    def read(self, row: int) -> Any:
        from post_training.data.prepared.dataset import PreparedRow
        from post_training.data.rows import COMPLETION, PROMPT

        generator = np.random.default_rng(row)
        ids = generator.integers(0, self.vocab_size, sum(self.lengths), np.int32)
        kinds = [
            np.where(np.arange(length) < length // 3, PROMPT, COMPLETION) for length in self.lengths
        ]
        return PreparedRow(ids, np.concatenate(kinds).astype(np.uint8), None, self.lengths)


@dataclass(frozen=True)
class MadeUpPairs:
    """A pair a row: a prompt, and two answers of `completion` tokens."""

    num_rows: int
    prompt: int
    completion: int
    vocab_size: int

    @property
    def counts(self) -> dict[str, int]:
        tokens = self.num_rows * (2 * self.prompt + 2 * self.completion)
        return {
            "num_rows": self.num_rows,
            "num_sequences": 2 * self.num_rows,
            "num_tokens": tokens,
        }

    def read(self, row: int) -> list[Any]:
        from post_training.data.pairs.dataset import Pair
        from post_training.data.prepared.dataset import PreparedRow
        from post_training.data.rows import COMPLETION

        generator = np.random.default_rng(row)
        prefix, *answers = (
            generator.integers(0, self.vocab_size, length, np.int32)
            for length in (self.prompt, self.completion, self.completion)
        )
        kinds = np.full(self.completion, COMPLETION, np.uint8)
        chosen, rejected = (PreparedRow(ids, kinds, None, (len(ids),)) for ids in answers)
        return [Pair(row, 0, prefix, chosen, rejected, np.full((2, 3), np.nan), False)]
