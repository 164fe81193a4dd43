"""Tools as a server is sent them, and calls without what Arrow puts into them."""

import json
from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.formats.tools import read_tools, unwrap_function
from post_training.data.rows import BadRow, Conversation

TOWN = {"type": "string", "description": "Where."}
LINE = {"type": "integer", "description": "Its number."}
USER = {"role": "user", "content": "Rain?"}
OUTPUT = {"role": "tool", "content": "3 mm"}
ANSWER = {"role": "assistant", "content": "Yes."}


def function(name: str, properties: dict[str, Any], required: Any = ()) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"name": name, "description": f"Runs {name}.", "parameters": parameters}


RAIN, TRAIN = function("rain", {"town": TOWN}, ["town"]), function("train", {"line": LINE})
# What Arrow makes of the two: all properties, with all their keys, in both.
PADDED = [
    function("rain", {"town": {**TOWN, "enum": None}, "line": None}, ["town"]),
    function("train", {"town": None, "line": {**LINE, "enum": None}}),
]


def tools_of(value: Any) -> list[Any]:
    return [json.loads(tool) for tool in read_tools(value, "tools")]


def conversation_of(row: dict[str, Any]) -> Conversation:
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    [conversation] = parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert isinstance(conversation, Conversation)
    return conversation


def arguments_of(arguments: Any, tools: Any = None) -> str:
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {"messages": [USER, calling, OUTPUT, ANSWER], "tools": tools}
    return conversation_of(row).messages[1].tool_calls[0].arguments


@pytest.mark.parametrize(
    "value",
    [
        [RAIN],
        [{"type": "function", "function": RAIN}],
        [{"type": "function", **RAIN}],
        [{"function": RAIN, "type": None, "name": None}],
        json.dumps([RAIN]),
        json.dumps([{"type": "function", "function": RAIN}]),
    ],
)
def test_tools_of_any_form_are_wrapped_as_a_server_is_sent_them(value: Any):
    assert read_tools(value, "tools") == (json.dumps({"type": "function", "function": RAIN}),)
    assert unwrap_function(*read_tools(value, "tools")) == RAIN


def test_tools_keep_what_stands_beside_the_function():
    strict = {"type": "function", "strict": True, "function": RAIN}
    assert tools_of([strict]) == [strict]
    assert unwrap_function(json.dumps(strict)) == strict


def test_tools_padding_of_arrow_is_not_declared():
    assert [tool["function"] for tool in tools_of(PADDED)] == [RAIN, TRAIN]


def test_tools_null_that_is_meant_stays():
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "default": None, "nullable": True},
            "b": {"enum": [None, "x"]},
            "c": {"anyOf": [{"type": "integer"}, {"type": "null"}], "const": None},
        },
    }
    [tool] = tools_of([{"name": "f", "parameters": schema}])
    assert tool["function"]["parameters"] == schema


def test_tools_as_text_stay_as_they_were_written():
    tool = {"name": "f", "description": None, "parameters": {"properties": {"a": None}}}
    assert tools_of(json.dumps([tool])) == [{"type": "function", "function": tool}]


@pytest.mark.parametrize(
    ("arguments", "tools", "expected"),
    [
        ({"town": "Thun", "line": None}, PADDED, '{"town": "Thun"}'),
        ({"town": None, "line": None}, PADDED, '{"town": null}'),
        ({"line": None}, [{"name": "rain"}], "{}"),
        ('{"town": "Thun", "line": null}', PADDED, '{"town": "Thun", "line": null}'),
        ('{"line":null}', None, '{"line":null}'),
        (
            {"at": [{"town": "Thun", "line": None}]},
            [function("rain", {"at": {"type": "array", "items": RAIN["parameters"]}})],
            '{"at": [{"town": "Thun"}]}',
        ),
    ],
)
def test_arguments_padding_of_arrow_is_not_trained(arguments: Any, tools: Any, expected: str):
    assert arguments_of(arguments, tools) == expected


@pytest.mark.parametrize("tools", [None, [TRAIN]])
def test_arguments_null_that_no_tool_explains_is_refused(tools: Any):
    with pytest.raises(BadRow) as bad:
        arguments_of({"town": "Thun", "line": None}, tools)
    key = "messages[1].tool_calls[0].function.arguments.line"
    assert bad.value.problem == f"{key}: is null, and no tool says whether it is an argument"
    assert bad.value.hint is not None
    assert "as JSON text" in bad.value.hint


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ('{"km": 1, "km": 2}', "malformed JSON: key 'km' stands twice in an object"),
        ('{"km": NaN}', "malformed JSON: NaN is no JSON number"),
        ('{"km": 1e999}', "malformed JSON: 1e999 is beyond the largest number"),
        ('{"to": "\\ud800"}', "half of a surrogate pair at column 9"),
        ('{"km": 1} extra', "more after the object, at column 11"),
        ('["km"]', "must be a JSON object"),
        ({"km": float("inf")}, "can't be written as JSON"),
    ],
)
def test_arguments_are_as_strict_as_the_row_itself(arguments: Any, problem: str):
    with pytest.raises(BadRow) as bad:
        arguments_of(arguments)
    key = "messages[1].tool_calls[0].function.arguments"
    assert (bad.value.reason, bad.value.problem[: len(key) + 2 + len(problem)]) == (
        "tool-call",
        f"{key}: {problem}",
    )


def test_arguments_keep_large_integers_and_letters():
    text = '{"km": 1.10, "id": 12345678901234567890, "to": "Zo\\u00eb"}'
    assert arguments_of(text) == text


def test_calls_in_two_fields_are_refused():
    call = {"name": "rain", "arguments": {}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call], "function_call": call}
    with pytest.raises(BadRow, match="calls stand in tool_calls and in function_call"):
        conversation_of({"messages": [USER, calling, OUTPUT, ANSWER]})
