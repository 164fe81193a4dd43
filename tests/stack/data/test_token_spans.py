"""Any span of any text: the tokens that share a character with it, found in both ways."""

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.data.tokenize import byte_lengths, spans_by_bytes, spans_by_offsets

characters = st.sampled_from([*"ab \n.", "é", "🙂", "e\u0301", "日本", "<|im_end|>", "user"])
texts = st.lists(characters, max_size=12).map("".join)


@given(texts=st.lists(texts, max_size=4), data=st.data())
@settings(max_examples=200, deadline=None)
def test_token_spans_of_any_characters_equal_a_naive_reference(
    texts: list[str], data: Any, tokenizers: Any
):
    backend = tokenizers["byte-level"].backend_tokenizer
    spans = [data.draw(spans_within(len(text))) for text in texts]
    encodings = [backend.encode(text, add_special_tokens=False) for text in texts]
    expected = [
        [naive(encoding.offsets, *span) for span in own]
        for encoding, own in zip(encodings, spans, strict=True)
    ]
    ids = np.array([token for encoding in encodings for token in encoding.ids], np.int32)
    ends = np.cumsum([len(encoding.ids) for encoding in encodings], dtype=np.int64)
    lengths = byte_lengths(json.loads(backend.to_str()))
    assert lengths is not None
    assert spans_by_bytes(lengths, ids, ends, texts, spans) == expected
    by_offsets = [spans_by_offsets(*each) for each in zip(encodings, spans, strict=True)]
    assert by_offsets == expected


def spans_within(length: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ascending spans of at least a character each, which may touch."""
    cuts = st.lists(st.integers(0, length), max_size=6, unique=True).map(sorted)
    return cuts.map(lambda found: list(zip(found[0::2], found[1::2], strict=False)))


def naive(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > start]
    return inside[0], inside[-1] + 1


def test_token_spans_of_a_text_that_its_ids_do_not_spell_are_none(tokenizers: Any):
    lengths = byte_lengths(json.loads(tokenizers["byte-level"].backend_tokenizer.to_str()))
    ids = np.array([tokenizers["byte-level"].convert_tokens_to_ids("a")] * 3, np.int32)
    found = spans_by_bytes(lengths, ids, np.array([2, 3]), ["aaa", "a"], [[(0, 1)], [(0, 1)]])
    assert found == [None, [(0, 1)]]
