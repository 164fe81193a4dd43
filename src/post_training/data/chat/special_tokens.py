"""The tokenizer's bos, eos and pad tokens, where the settings name others than its own."""

import copy
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.config import SpecialTokens


def with_special_tokens(tokenizer: Any, settings: SpecialTokens) -> Any:
    """A copy of the tokenizer with the tokens that the settings name.

    Errors: PostTrainingError for a token that is not in the vocabulary: its embedding would have
    been trained by nobody.
    """
    named = settings.model_dump(exclude_none=True)
    if not named:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    for setting, token in named.items():
        if token not in vocabulary:
            raise PostTrainingError(
                f"the tokenizer has no token {token!r}", where=f"data.special_tokens.{setting}"
            )
    changed = copy.deepcopy(tokenizer)
    # As special tokens, so that where a template writes one it is never split.
    changed.add_special_tokens(named)
    return changed
