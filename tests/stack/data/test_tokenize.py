"""What a row becomes: the kinds and weights of its tokens, texts, and the encoder itself."""

import pickle
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from helpers.encoded_rows import assistant, encode, encoder, of_kind, reason, user
from post_training.core.errors import PostTrainingError
from post_training.data.rows import (
    COMPLETION,
    EXCLUDED,
    PROMPT,
    BadRow,
    Conversation,
    Message,
    Text,
    ToolCall,
)

SHORT = (user("ab"), assistant("cd"))


def test_encode_trains_the_answer_and_its_end(tokenizer: Any):
    sequence = encode(tokenizer, *SHORT)
    assert tokenizer.decode(sequence.ids) == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    )
    #       <|im_start|> user \n ab <|im_end|> \n <|im_start|> assistant \n
    num_prompt = 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1
    assert sequence.kinds.tolist() == [PROMPT] * num_prompt + [COMPLETION] * 3 + [PROMPT]
    assert sequence.ids.dtype == np.int32
    assert sequence.kinds.dtype == np.uint8
    assert sequence.weights is None


def test_encode_messages_of_a_prompt_or_excluded_are_not_trained(tokenizer: Any):
    messages = (
        *(user("q"), assistant("one", PROMPT)),
        *(user("q"), assistant("two", EXCLUDED)),
        *(user("q"), assistant("three")),
    )
    sequence = encode(tokenizer, *messages)
    assert of_kind(sequence, COMPLETION, tokenizer) == "·three<|im_end|>·"
    assert of_kind(sequence, EXCLUDED, tokenizer) == "·two<|im_end|>·"


def test_encode_weights_stand_on_the_tokens_of_their_message(tokenizer: Any):
    messages = (user("q"), assistant("one", weight=0.5), user("q"), assistant("two"))
    sequence = encode(tokenizer, *messages)
    assert sequence.weights.dtype == np.float32
    lighter = sequence.ids[sequence.weights == 0.5]
    assert tokenizer.decode(lighter) == "one<|im_end|>"
    assert set(sequence.weights.tolist()) == {0.5, 1.0}


def test_encode_thought_call_and_answer_have_kinds_of_their_own(kind: str, tokenizers: Any):
    tokenizer = tokenizers[kind]
    messages = (
        user("q"),
        assistant("", EXCLUDED, thought="hm"),
        assistant("", tool_calls=(ToolCall("add", '{"a": 1}'),)),
        Message("tool", "42"),
        assistant("so", weight=2.0),
    )
    sequence = encode(tokenizer, *messages, name="apertus")

    def trained(chosen: Any) -> str:
        return tokenizer.decode(sequence.ids[chosen]).replace(" ", "")

    assert trained(sequence.kinds == EXCLUDED) == "<|inner_prefix|>hm"
    assert trained((sequence.kinds == COMPLETION) & (sequence.weights == 1)) == (
        '<|tools_prefix|>[{"add":{"a":1}}]<|tools_suffix|>'
    )
    assert trained(sequence.weights == 2) == "<|inner_suffix|>so<|assistant_end|>"


def test_encode_text_is_trained_whole_and_ends_with_eos(tokenizers: Any):
    plain, with_bos = tokenizers["byte-level"], tokenizers["byte-level, own split, bos"]
    [sequence] = encoder(plain).encode([Text("some text")])
    expected = plain("some text", add_special_tokens=False)["input_ids"]
    assert sequence.ids.tolist() == [*expected, plain.eos_token_id]
    assert set(sequence.kinds.tolist()) == {COMPLETION}
    [sequence] = encoder(with_bos).encode([Text("some text")])
    assert sequence.ids.tolist() == [*with_bos("some text")["input_ids"], with_bos.eos_token_id]


def test_encode_text_without_an_eos_token_is_refused(tokenizer: Any):
    tokenizer.eos_token = None
    with pytest.raises(PostTrainingError, match="no eos token to end a text with"):
        encoder(tokenizer).encode([Text("a")])


def test_encode_keeps_the_order_among_bad_rows(tokenizer: Any):
    good, bad = Conversation(SHORT), Conversation((user("q"), assistant("x", EXCLUDED)))
    results = encoder(tokenizer).encode([bad, good, Text(""), Text("a"), bad])
    assert [isinstance(result, BadRow) for result in results] == [True, False, True, False, True]
    assert reason(results[0]) == "untrained: no token to train on"
    assert reason(results[2]) == "untrained: no token to train on"
    assert encoder(tokenizer).encode([]) == []
    assert [result.reason for result in encoder(tokenizer).encode([bad])] == ["untrained"]


def test_create_tokenizer_with_offsets_beside_the_text_is_refused(tokenizer: Any):
    # Offsets are those of the text before the normaliser; this one has no idea of them.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("first-answer", "other-answer")
    with pytest.raises(PostTrainingError, match="offsets don't mark the trained turns"):
        encoder(tokenizer)


def test_create_tokenizer_with_dropout_is_refused(tokenizer: Any):
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(PostTrainingError, match="has dropout"):
        encoder(tokenizer)


def test_encoder_pickled_gives_the_same(tokenizers: Any):
    own = encoder(tokenizers["byte-level"], "apertus")
    rows = [Conversation(SHORT), Text("a")]
    for first, second in zip(
        own.encode(rows), pickle.loads(pickle.dumps(own)).encode(rows), strict=True
    ):
        assert first.ids.tolist() == second.ids.tolist()
        assert first.kinds.tolist() == second.kinds.tolist()


def test_encode_uses_byte_lengths_where_ids_spell_the_text(tokenizers: Any):
    assert encoder(tokenizers["byte-level, NFC"]).lengths is not None
    assert encoder(tokenizers["byte-level, prefix space"]).lengths is None
    assert encoder(tokenizers["metaspace always"]).lengths is None
