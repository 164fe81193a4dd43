"""A new model: a byte-level BPE tokenizer trained on a corpus, and randomly initialised weights."""

from collections.abc import Iterable
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from post_training.core.errors import PostTrainingError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_ARCHITECTURES = {"llama": LlamaConfig, "apertus": ApertusConfig}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, markers: tuple[str, ...], chat_template: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text is representable, there is no unknown token.

    vocab_size: an upper limit; a small corpus has fewer pairs to merge. markers: the chat
    template's own tokens. The same texts give the same tokenizer.
    """
    special = [BOS, EOS, PAD, *markers]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise PostTrainingError(
            f"vocab_size: must be ≥ {len(alphabet) + len(special)}: "
            f"{len(alphabet)} bytes and {len(special)} special tokens (got {vocab_size})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def create_model(
    architecture: Literal["llama", "apertus"],
    shape: dict[str, int | bool],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> PreTrainedModel:
    """Weights in float32, drawn on the CPU from `seed`. shape: sizes, named as in the config."""
    config = _ARCHITECTURES[architecture](
        **shape,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
