"""What a tokenizer is, in one hash."""

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.hashing import sha256_value


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides the ids of a text: the tokenizer itself and its special tokens' names; not
    of its chat template or its folder."""
    return sha256_value([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])
