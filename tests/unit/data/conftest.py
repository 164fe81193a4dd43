"""A byte-level tokenizer in which every character of ASCII is a token of its own."""

from typing import Any

import pytest


@pytest.fixture
def tokenizer() -> Any:
    pytest.importorskip("tokenizers")
    from post_training.models.create import train_tokenizer

    markers = ("<|im_start|>", "<|im_end|>")
    return train_tokenizer([], 261, markers, chat_template="")
