"""What rows of each format are read into."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.real_data import GSM8K, needs_gsm8k
from post_training.data.config import DatasetConfig
from post_training.data.formats.columns import Format
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import COMPLETION, PROMPT, Conversation, Message, Row, Text
from post_training.data.sources.open import read_objects

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "be brief"}
ASKED = Message("user", "1 + 1?")
ANSWERED = Message("assistant", "2", COMPLETION)
TOLD = Message("system", "be brief")


def found_in(row: dict[str, Any], **settings: Any) -> Format:
    return recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")


def rows_of(
    row: dict[str, Any],
    *,
    train_on: Any = "all_turns",
    train_on_thoughts: bool = True,
    **settings: Any,
) -> list[Row]:
    found = pickle.loads(pickle.dumps(found_in(row, **settings)))
    return parse(row, found, train_on=train_on, train_on_thoughts=train_on_thoughts)


def messages_of(row: dict[str, Any], **settings: Any) -> tuple[Message, ...]:
    [conversation] = rows_of(row, **settings)
    assert isinstance(conversation, Conversation)
    return conversation.messages


@pytest.mark.parametrize(
    ("row", "described", "settings"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages (messages: role, content)", {}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1 + 1?"},
                    {"from": "gpt", "value": "2"},
                ]
            },
            "messages (conversations: from, value)",
            {},
        ),
        ({"conversations": [USER, ASSISTANT]}, "messages (conversations: role, content)", {}),
        (
            {"chat": [{"who": "me", "says": "1 + 1?"}, {"who": "it", "says": "2"}]},
            "messages (chat: who, says)",
            {
                "columns": {"messages": "chat"},
                "message_fields": {"role": "who", "content": "says"},
                "roles": {"me": "user", "it": "assistant"},
            },
        ),
        ({"prompt": "1 + 1?", "completion": "2"}, "prompt_completion (prompt, completion)", {}),
        (
            {"prompt": [USER], "completion": "2"},
            "prompt_completion (prompt, completion: role, content)",
            {},
        ),
        (
            {"prompt": "1 + 1?", "completion": [ASSISTANT]},
            "prompt_completion (prompt, completion: role, content)",
            {},
        ),
        *(
            ({first: "1 + 1?", second: "2"}, f"prompt_completion ({first}, {second})", {})
            for first, second in (
                ("inputs", "targets"),
                ("question", "answer"),
                ("question", "response"),
                ("query", "answer"),
                ("query", "response"),
                ("instruction", "response"),
            )
        ),
        (
            {"q": "1 + 1?", "a": "2"},
            "prompt_completion (q, a)",
            {"columns": {"prompt": "q", "completion": "a"}},
        ),
        ({"instruction": "1 + 1?", "output": "2"}, "alpaca (instruction, output)", {}),
        (
            {"instruction": "1 + 1?", "input": "", "output": "2"},
            "alpaca (instruction, output)",
            {},
        ),
        (
            {"messages": [USER, ASSISTANT], "text": "x"},
            "messages (messages: role, content)",
            {"format": "messages"},
        ),
        (
            {"messages": [USER, ASSISTANT], "prompt": "x", "id": 3, "score": None},
            "messages (messages: role, content)",
            {},
        ),
    ],
)
def test_formats_of_one_conversation_give_one_row_type(
    row: dict[str, Any], described: str, settings: dict[str, Any]
):
    assert found_in(row, **settings).describe() == described
    assert messages_of(row, **settings) == (ASKED, ANSWERED)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "system": "be brief"},
        {"question": "1 + 1?", "response": "2", "system_prompt": "be brief"},
        {"instruction": "1 + 1?", "output": "2", "system": "be brief"},
        {"messages": [SYSTEM, USER, ASSISTANT], "system": None},
    ],
)
def test_formats_system_column_becomes_the_first_message(row: dict[str, Any]):
    assert messages_of(row) == (TOLD, ASKED, ANSWERED)


def test_formats_empty_system_message_is_no_message():
    assert messages_of({"messages": [{**SYSTEM, "content": " "}, USER, ASSISTANT]}) == (
        ASKED,
        ANSWERED,
    )


def test_formats_text_is_a_document():
    assert rows_of({"text": " a story ", "id": 1}) == [Text(" a story ")]


def test_formats_alpaca_input_follows_the_instruction():
    first, _ = messages_of({"instruction": "Translate.", "input": "Hund", "output": "dog"})
    assert first.content == "Translate.\n\nHund"


def test_formats_roles_have_many_names():
    names = [("Human", "GPT"), ("user", "bot"), ("human", "chatbot"), ("user", "model")]
    messages = [{"from": name, "value": "x"} for turn in names for name in (turn[0], turn[1])]
    read = messages_of({"conversations": messages})
    assert [message.role for message in read] == ["user", "assistant"] * 4


texts = st.text(min_size=1).filter(str.strip)


@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), system=st.none() | texts)
def test_formats_messages_and_their_other_spelling_are_the_same(
    turns: list[tuple[str, str]], system: str | None
):
    pairs = [("system", system)] if system else []
    pairs += [pair for asked, answer in turns for pair in (("user", asked), ("assistant", answer))]
    spelled = {"system": "system", "user": "human", "assistant": "gpt"}
    read = messages_of({"messages": [{"role": role, "content": text} for role, text in pairs]})
    other = [{"from": spelled[role], "value": text} for role, text in pairs]
    assert messages_of({"conversations": other}) == read
    assert [(message.role, message.content) for message in read] == pairs
    assert [message.kind == COMPLETION for message in read] == [
        role == "assistant" for role, _ in pairs
    ]


@needs_gsm8k
def test_formats_gsm8k_is_read_as_questions_and_answers():
    rows = list(read_objects(GSM8K / "train.jsonl"))
    assert len(rows) == 7473
    assert found_in(rows[0]).describe() == "prompt_completion (question, answer)"
    read = [messages_of(row) for row in rows]
    assert all([m.kind for m in messages] == [PROMPT, COMPLETION] for messages in read)
    assert [m[1].content for m in read] == [row["answer"] for row in rows]
