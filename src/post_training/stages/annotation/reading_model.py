"""How a model reads rows: its tokenizer, with a chat template."""

from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.data.chat.special_tokens import with_special_tokens
from post_training.data.chat.templates import choose_template
from post_training.data.tokenize import Encoder
from post_training.models.load import load_tokenizer
from post_training.stages.annotation.config import TemplatedDataConfig


def load_own_tokenizer(path: Path, data: TemplatedDataConfig) -> PreTrainedTokenizerBase:
    """Of a model's folder, with the special tokens that the settings ask for.

    Errors: PostTrainingError when there is none.
    """
    return with_special_tokens(load_tokenizer(path), data.special_tokens)


def load_encoder(path: Path, data: TemplatedDataConfig) -> Encoder:
    """Of the tokenizer in a model's folder.

    Errors: PostTrainingError when there is none, or the template doesn't go with it.
    """
    tokenizer = load_own_tokenizer(path, data)
    template = choose_template(data.chat_template, tokenizer)
    return Encoder.create(tokenizer, template, control_tokens=data.control_tokens)
