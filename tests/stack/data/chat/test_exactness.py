"""Ids and kinds against those of transformers, and against a naive reading of the offsets, for any
text, every template and several kinds of tokenizer."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.encoded_rows import assistant, encode, encoder, of_kind, user
from helpers.real_data import GSM8K, needs_gsm8k
from post_training.data.chat.rendering import message_dicts, render
from post_training.data.chat.templates import MARKERS
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT, Conversation, Message, ToolCall
from post_training.data.tokenize import Encoder
from post_training.models.save import train_tokenizer


def naive(conversation: Conversation, own: Encoder, tokenizer: Any) -> tuple[list[int], list[int]]:
    """ids and kinds, token by token: that of the last span it shares a character with."""
    dicts = message_dicts(conversation)
    text, spans = render(own.template.text, dicts, tokenizer.special_tokens_map)
    kind_at = {}
    parts = [part for parts in dicts.parts for part in parts]
    for (start, end), part in zip(spans, parts, strict=True):
        kind_at |= dict.fromkeys(range(start, end), part.kind)
    kinds = []
    for start, end in own.backend.encode(text, add_special_tokens=False).offsets:
        found = [kind_at[position] for position in range(start, end) if position in kind_at]
        kinds.append(found[-1] if found else PROMPT)
    return tokenizer(text, add_special_tokens=False)["input_ids"], kinds


def assert_equals_naive(conversation: Conversation, own: Encoder, tokenizer: Any) -> None:
    ids, kinds = naive(conversation, own, tokenizer)
    for each in (own, replace(own, words=None), replace(own, words=None, lengths=None)):
        [sequence] = each.encode([conversation])
        assert sequence.ids.tolist() == ids
        assert sequence.kinds.tolist() == kinds


def assert_equals_transformers(conversation: Conversation, own: Encoder, tokenizer: Any) -> None:
    [sequence] = own.encode([conversation])
    theirs = tokenizer.apply_chat_template(
        message_dicts(conversation).messages,
        chat_template=own.template.text,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert sequence.ids.tolist() == theirs["input_ids"]
    assert (sequence.kinds == COMPLETION).tolist() == [x == 1 for x in theirs["assistant_masks"]]


edges = st.sampled_from(
    ["", " ", "\n", "\n\n", "  \n", "\t", "🙂", "e\u0301", "\u0301", "日本", "▁"]
)
texts = st.tuples(edges, st.text(max_size=12), edges).map("".join).filter(str.strip)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


# By kind of tokenizer and template: making one takes longer than an example.
ENCODERS: dict[tuple[str, str], Encoder] = {}


def kept_encoder(kind: str, name: str, tokenizer: Any) -> Encoder:
    if (kind, name) not in ENCODERS:
        ENCODERS[kind, name] = encoder(tokenizer, name, "keep")
    return ENCODERS[kind, name]


@pytest.mark.parametrize("name", MARKERS)
@given(turns=turns, system=st.none() | st.just("") | texts)
@settings(max_examples=25, deadline=None)
def test_encode_any_text_equals_a_naive_reference(
    kind: str, name: str, turns: list[tuple[str, str]], system: str | None, tokenizers: Any
):
    tokenizer = tokenizers[kind]
    own = kept_encoder(kind, name, tokenizer)
    messages = [message for q, a in turns for message in (user(q), assistant(a))]
    # Where the template moves it from turn to turn, a row of several is several texts.
    is_one_text = len(turns) == 1 or "system" not in own.template.moves
    if system is not None and "system" not in own.template.lost and is_one_text:
        messages.insert(0, Message("system", system))
    conversation = Conversation(tuple(messages))
    assert_equals_naive(conversation, own, tokenizer)
    # There transformers takes a span that begins with a space for one past the end.
    if kind != "byte-level, trimmed offsets":
        assert_equals_transformers(conversation, own, tokenizer)


@given(thought=texts, answer=texts)
@settings(max_examples=25, deadline=None)
def test_encode_any_thought_equals_a_naive_reference(
    kind: str, thought: str, answer: str, tokenizers: Any
):
    own = kept_encoder(kind, "apertus", tokenizers[kind])
    call = assistant("", tool_calls=(ToolCall("f", "{}"),))
    # The end of a thought is the end of a span, with nothing after it that is marked.
    messages = (user("q"), assistant("", EXCLUDED, thought=thought), call, Message("tool", "o"))
    last = (assistant("", EXCLUDED, thought=thought), assistant(answer))
    conversation = Conversation((*messages, *last))
    assert_equals_naive(conversation, own, tokenizers[kind])


def test_encode_text_composed_to_the_same_length_is_placed_right(tokenizers: Any):
    # One character grows by three bytes where the other three lose one each.
    conversation = Conversation((user("\u0958"), assistant("e\u0301e\u0301e\u0301 x")))
    tokenizer = tokenizers["byte-level, NFC"]
    assert_equals_naive(conversation, encoder(tokenizer), tokenizer)


def test_encode_batch_equals_its_rows_one_by_one(kind: str, tokenizers: Any):
    own = encoder(tokenizers[kind], "tulu")
    texts = ["plain", " é", "日本🙂", "e\u0301 x", "\n\n", "z"]
    rows = [Conversation((user(text), assistant(text + "."))) for text in texts]
    for row, sequence in zip(rows, own.encode(rows), strict=True):
        [alone] = own.encode([row])
        assert sequence.ids.tolist() == alone.ids.tolist()
        assert sequence.kinds.tolist() == alone.kinds.tolist()


def test_encode_token_across_the_start_of_an_answer_is_trained():
    markers = ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer(["\n\n"] * 9, 262, markers, chat_template="")
    sequence = encode(tokenizer, user("ab"), assistant("\n\ncd"))
    # Of the three newlines the first is the template's; it makes one token with the second.
    assert of_kind(sequence, COMPLETION, tokenizer) == "·\n\n\ncd<|im_end|>·"


@needs_gsm8k
@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.parametrize("kind", ["byte-level", "metaspace first"])
def test_encode_gsm8k_equals_transformers(kind: str, name: str, tokenizers: Any):
    own = encoder(tokenizers[kind], name)
    with open(GSM8K / "train.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for _, line in zip(range(100), file, strict=False)]
    for line in lines:
        conversation = Conversation((user(line["question"]), assistant(line["answer"])))
        assert_equals_transformers(conversation, own, tokenizers[kind])
