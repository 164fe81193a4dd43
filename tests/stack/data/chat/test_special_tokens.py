from typing import Any

import pytest

from post_training.core.errors import PostTrainingError
from post_training.data.chat.templates import with_special_tokens
from post_training.data.config import SpecialTokens


def test_with_special_tokens_names_others_and_leaves_the_original(tokenizer: Any):
    changed = with_special_tokens(tokenizer, SpecialTokens(eos_token="<|im_end|>"))
    assert changed.eos_token == "<|im_end|>"
    assert changed.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (changed.bos_token, changed.pad_token) == (tokenizer.bos_token, tokenizer.pad_token)
    assert len(changed) == len(tokenizer)
    assert tokenizer.eos_token == "</s>"


def test_with_special_tokens_makes_an_ordinary_token_one_that_is_never_split(tokenizer: Any):
    # "~" alone is a token, but not one that is looked for first: here it merges with its neighbour.
    tokenizer.backend_tokenizer.add_tokens(["~~"])
    changed = with_special_tokens(tokenizer, SpecialTokens(eos_token="~~"))
    assert "~~" in changed.all_special_tokens
    assert changed.encode("a~~", add_special_tokens=False)[-1] == changed.eos_token_id


def test_with_special_tokens_without_settings_is_the_tokenizer(tokenizer: Any):
    assert with_special_tokens(tokenizer, SpecialTokens()) is tokenizer


def test_with_special_tokens_outside_the_vocabulary_is_refused(tokenizer: Any):
    with pytest.raises(PostTrainingError) as error:
        with_special_tokens(tokenizer, SpecialTokens(pad_token="<none>"))
    assert str(error.value) == "data.special_tokens.pad_token: the tokenizer has no token '<none>'"
