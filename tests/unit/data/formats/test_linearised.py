"""SwissAI's linearised messages: the structured contents that its stages write."""

from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import (
    COMPLETION,
    BadRow,
    Conversation,
    Message,
    Preference,
    Row,
    ToolCall,
)

FUNCTION_TEXT = '{"name": "weather", "description": "of a place", "parameters": {"type": "object"}}'
TOOL_TEXT = f'{{"type": "function", "function": {FUNCTION_TEXT}}}'
OPENING = (Message("system", "be brief"), Message("user", "Bern?"))
LINEAR_OPENING = [
    {"role": "system", "content": {"text": "be brief", "parts": None, "blocks": None}},
    {"role": "developer", "content": {"tools": f"[{FUNCTION_TEXT}]", "has_thinking": True}},
    {"role": "user", "content": {"parts": [{"type": "text", "text": "Bern?"}]}},
]


def linear(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [*LINEAR_OPENING, {"role": "assistant", "content": {"blocks": list(blocks)}}]


def block(kind: str, text: str = "", **fields: Any) -> dict[str, Any]:
    empty = {"calls": [{"name": "", "arguments": ""}], "outputs": [{"name": "", "output": ""}]}
    return {"type": kind, "text": text} | empty | fields


def read(value: dict[str, Any]) -> list[Row]:
    found = recognise(value, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    return parse(value, found, train_on="all_turns", train_on_thoughts=True)


def test_linearised_turn_thinks_calls_and_answers():
    call = {"name": "weather", "arguments": '{"place": "Bern"}'}
    messages = linear(
        block("thoughts", "let me see"),
        block("tool_calls", calls=[call]),
        block("tool_outputs", outputs=[{"name": "", "output": "sunny"}]),
        block("response", "It is sunny."),
    )
    called = (ToolCall("weather", '{"place": "Bern"}'),)
    assert read({"messages": messages}) == [
        Conversation(
            (
                *OPENING,
                Message("assistant", "", COMPLETION, thought="let me see", tool_calls=called),
                Message("tool", "sunny"),
                Message("assistant", "It is sunny.", COMPLETION),
            ),
            (TOOL_TEXT,),
        )
    ]


def test_linearised_preference_is_read_with_its_tools():
    value = {
        "chosen": linear(block("response", "a")),
        "rejected": linear(block("response", "b")),
        "chosen_reward": 1.0,
    }
    assert read(value) == [
        Preference(
            OPENING,
            (Message("assistant", "a", COMPLETION),),
            (Message("assistant", "b", COMPLETION),),
            (TOOL_TEXT,),
            {"chosen_reward": 1.0},
        )
    ]


@pytest.mark.parametrize(
    ("content", "reason", "problem"),
    [
        ({"blocks": [block("poem")]}, "columns", "messages[3].content.blocks[0].type: must be one"),
        ({"blocks": []}, "empty", "messages[3].content.blocks: is empty"),
        ({"blocks": None}, "columns", "messages[3].content.blocks: must be a list (got null)"),
        ({"blocks": [block("tool_outputs")]}, "tool-call", "messages[3]: a tool's output without"),
    ],
)
def test_linearised_bad_message_gets_a_verdict(content: Any, reason: str, problem: str):
    with pytest.raises(BadRow) as bad:
        read({"messages": [*LINEAR_OPENING, {"role": "assistant", "content": content}]})
    assert bad.value.reason == reason
    assert bad.value.problem.startswith(problem)
