"""What of a conversation is trained: turns, weights, thoughts, calls."""

import json
from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT, Conversation, Message, ToolCall

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OUTPUT = {"role": "tool", "content": "2"}


def conversation_of(
    row: dict[str, Any],
    *,
    train_on: Any = "all_turns",
    train_on_thoughts: bool = True,
    **settings: Any,
) -> Conversation:
    found = recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")
    [row] = parse(row, found, train_on=train_on, train_on_thoughts=train_on_thoughts)
    assert isinstance(row, Conversation)
    return row


def messages_of(row: dict[str, Any], **settings: Any) -> tuple[Message, ...]:
    return conversation_of(row, **settings).messages


def kinds(row: dict[str, Any], **settings: Any) -> list[int]:
    return [message.kind for message in messages_of(row, **settings)]


def test_masks_every_turn_or_the_last_is_trained():
    row = {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER]}
    assert kinds(row) == [PROMPT, PROMPT, COMPLETION, PROMPT, COMPLETION, PROMPT]
    assert kinds(row, train_on="last_turn") == [PROMPT] * 4 + [COMPLETION, PROMPT]


def test_masks_last_turn_includes_its_calls():
    row = {"messages": [USER, ASSISTANT, USER, CALLING, OUTPUT, ASSISTANT]}
    assert kinds(row, train_on="last_turn") == [
        *(PROMPT, PROMPT, PROMPT),
        *(COMPLETION, PROMPT, COMPLETION),
    ]


def test_masks_prompt_is_never_trained_whatever_it_says():
    row = {
        "prompt": [SYSTEM, USER, {**ASSISTANT, "weight": 1}, USER],
        "completion": [{**ASSISTANT, "weight": 0.5}, USER, ASSISTANT],
    }
    assert kinds(row, train_on="last_turn") == [PROMPT] * 4 + [COMPLETION, PROMPT, COMPLETION]
    assert [message.weight for message in messages_of(row)] == [1, 1, 1, 1, 0.5, 1, 1]


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
def test_masks_weights_of_messages_decide(train_on: str):
    weights = [0.5, 0, None, 1]
    messages = [m for weight in weights for m in (USER, {**ASSISTANT, "weight": weight})]
    read = messages_of({"messages": messages}, train_on=train_on)[1::2]
    assert [message.kind for message in read] == [COMPLETION, EXCLUDED, COMPLETION, COMPLETION]
    assert [message.weight for message in read if message.kind == COMPLETION] == [0.5, 1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, False) for name in ("train", "trainable", "training", "loss", "loss_mask")),
        ("loss_mask", 0),
        ("loss_weight", 0.0),
        ("weight", 0),
    ],
)
def test_masks_turn_that_other_trainers_leave_out_is_left_out(name: str, value: Any):
    row = {"messages": [USER, {**ASSISTANT, name: value}, USER, ASSISTANT]}
    assert kinds(row) == [PROMPT, EXCLUDED, PROMPT, COMPLETION]
    asked_for = {
        "messages": [USER, {**ASSISTANT, name: 1 if value == 0 else True}, USER, ASSISTANT]
    }
    assert kinds(asked_for) == [PROMPT, COMPLETION, PROMPT, COMPLETION]


def test_masks_mapped_weight_may_be_a_boolean():
    messages = [USER, {**ASSISTANT, "train": False}, USER, {**ASSISTANT, "train": True}]
    settings = {"message_fields": {"weight": "train"}}
    assert kinds({"messages": messages}, **settings)[1::2] == [EXCLUDED, COMPLETION]


def test_masks_thought_is_part_of_its_message_or_left_untrained():
    row = {"messages": [USER, {**ASSISTANT, "reasoning_content": "easy"}]}
    assert messages_of(row)[1] == Message("assistant", "2", COMPLETION, thought="easy")
    assert messages_of(row, train_on_thoughts=False)[1:] == (
        Message("assistant", "", EXCLUDED, thought="easy"),
        Message("assistant", "2", COMPLETION),
    )


def test_masks_tool_calls_are_read_with_their_outputs():
    older = {"role": "assistant", "content": "so:", "function_call": {"name": "f", "arguments": {}}}
    row = {
        "messages": [USER, CALLING, {"role": "function", "content": ""}, older],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"x": "é"}}}],
    }
    conversation = conversation_of(row)
    assert conversation == Conversation(
        (
            Message("user", "1 + 1?"),
            Message("assistant", "", COMPLETION, tool_calls=(ToolCall("add", '{"a":1}', "1"),)),
            Message("tool", "", tool_call_id="1"),
            Message("assistant", "so:", COMPLETION, tool_calls=(ToolCall("f", "{}"),)),
        ),
        ('{"type": "function", "function": {"name": "add", "parameters": {"x": "é"}}}',),
    )
    same = conversation_of({**row, "tools": json.dumps(row["tools"])})
    assert same == conversation
