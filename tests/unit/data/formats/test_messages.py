"""Lists of messages: whose output is whose, and the calls of other systems."""

import json
from collections import Counter
from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import BadRow, Conversation, Message, ToolCall

USER = {"role": "user", "content": "Rain in Thun, and the next train?"}
ANSWER = {"role": "assistant", "content": "3 mm; at 14:05."}


def call(name: str, call_id: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def output(content: str, call_id: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, **fields}


def calling(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


RAIN, TRAIN = call("rain", "call_rain"), call("train", "call_train")


def conversation_of(row: dict[str, Any], **settings: Any) -> Conversation:
    found = recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")
    [conversation] = parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert isinstance(conversation, Conversation)
    return conversation


def check_columns(row: dict[str, Any]) -> Counter[str]:
    filled: Counter[str] = Counter()
    recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1").check_columns(row, filled)
    return filled


def outputs_of(*messages: dict[str, Any]) -> list[tuple[str, str | None]]:
    read = conversation_of({"messages": [USER, *messages, ANSWER]}).messages
    return [(each.content, each.tool_call_id) for each in read if each.role == "tool"]


def problem_of(row: dict[str, Any], **settings: Any) -> BadRow:
    with pytest.raises(BadRow) as bad:
        conversation_of(row, **settings)
    return bad.value


def test_outputs_come_in_the_order_of_their_calls():
    outputs = [output("14:05", "call_train"), output("3 mm", "call_rain")]
    in_order = [("3 mm", "call_rain"), ("14:05", "call_train")]
    assert outputs_of(calling(RAIN, TRAIN), *outputs) == in_order
    assert outputs_of(calling(RAIN, TRAIN), *outputs[::-1]) == in_order


def test_outputs_of_a_later_call_are_paired_with_it():
    first = [calling(RAIN), output("3 mm", "call_rain")]
    again = [calling(call("rain", "b"), call("rain", "a")), output("x", "a"), output("y", "b")]
    assert outputs_of(*first, *again) == [("3 mm", "call_rain"), ("y", "b"), ("x", "a")]


def test_outputs_without_ids_stand_as_they_are_and_get_those_of_the_calls():
    outputs = [output("3 mm"), output("14:05")]
    assert outputs_of(calling(call("rain"), call("train")), *outputs) == [
        ("3 mm", None),
        ("14:05", None),
    ]
    assert outputs_of(calling(RAIN, TRAIN), *outputs) == [
        ("3 mm", "call_rain"),
        ("14:05", "call_train"),
    ]


def test_outputs_across_the_end_of_a_prompt_are_ordered_too():
    row = {
        "prompt": [USER, calling(RAIN, TRAIN), output("14:05", "call_train")],
        "completion": [output("3 mm", "call_rain"), ANSWER],
    }
    read = conversation_of(row).messages
    assert [each.content for each in read[2:4]] == ["3 mm", "14:05"]


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        (
            [output("14:05", "call_nobody"), output("3 mm", "call_rain")],
            "messages[2].tool_call_id: 'call_nobody' is of no call before it",
        ),
        (
            [output("3 mm", "call_rain"), output("14:05")],
            "messages[3]: has no tool_call_id, and other outputs have one",
        ),
        (
            [output("3 mm", "call_rain"), output("4 mm", "call_rain")],
            "messages[2]: outputs of one call stand twice, or one of an earlier call is missing",
        ),
        (
            [output("14:05", "call_train")],
            "messages[2]: outputs of one call stand twice, or one of an earlier call is missing",
        ),
    ],
)
def test_outputs_that_belong_to_no_call_are_refused(outputs: list[Any], problem: str):
    bad = problem_of({"messages": [USER, calling(RAIN, TRAIN), *outputs, ANSWER]})
    assert (bad.reason, bad.problem) == ("tool-call", problem)


def test_output_after_another_turn_of_the_user_is_of_no_call():
    rest = [USER, output("3 mm", "call_rain"), ANSWER]
    bad = problem_of({"messages": [USER, calling(RAIN), *rest]})
    assert bad.problem == "messages[3]: a tool's output without a call before it"


def test_output_of_calls_with_one_id_is_refused():
    outputs = [output("3 mm", "call_rain"), output("4 mm", "call_rain")]
    bad = problem_of({"messages": [USER, calling(RAIN, RAIN), *outputs, ANSWER]})
    assert bad.problem == "messages[2].tool_call_id: 'call_rain' is of several calls before it"


def test_output_keeps_its_name():
    named = conversation_of({"messages": [USER, calling(RAIN), output("3", name="rain"), ANSWER]})
    assert named.messages[2] == Message("tool", "3", tool_call_id="call_rain", name="rain")


def test_function_call_is_a_turn_of_calls():
    called = {"name": "rain", "arguments": {"town": "Thun"}}
    arguments = '{"town": "Thun"}'
    for value, calls in (
        (called, (ToolCall("rain", arguments),)),
        ([called, called], (ToolCall("rain", arguments),) * 2),
    ):
        turns = [("human", "Rain?"), ("function_call", json.dumps(value)), ("observation", "3")]
        turns += [("observation", "4")] * (len(calls) - 1) + [("gpt", "3 mm.")]
        row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        conversation = conversation_of(row)
        assert conversation.messages[1].tool_calls == calls
        assert [message.kind for message in conversation.messages[:2]] == [0, 1]
        assert conversation.messages[-1].content == "3 mm."
    bad = problem_of(
        {"conversations": [row["conversations"][0], {"from": "function_call", "value": "rain()"}]}
    )
    assert bad.problem.startswith("conversations[1].value: malformed JSON")


HERMES = [
    ("system", "You may call <tools>[…]</tools>"),
    ("human", "Rain in Thun?"),
    ("gpt", '<tool_call>\n{"name": "rain"}\n</tool_call>'),
    ("tool", "<tool_response>\n3 mm\n</tool_response>"),
    ("gpt", "3 mm."),
]


def test_calls_in_the_text_are_refused_with_the_way_to_train_them():
    row = {"conversations": [{"from": role, "value": text} for role, text in HERMES]}
    bad = problem_of(row)
    assert bad.problem == "conversations[3]: a tool's output without a call before it"
    assert bad.hint is not None
    assert "roles: {tool: user}" in bad.hint
    read = conversation_of(row, roles={"tool": "user"}).messages
    assert [message.content for message in read] == [text for _, text in HERMES]
    assert [message.kind for message in read] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thought_has_several_names(name: str):
    row = {"messages": [USER, {**ANSWER, "thinking": "", "reasoning": None, name: "Ten and one."}]}
    assert conversation_of(row).messages[1].thought == "Ten and one."


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {**ANSWER, "reasoning": "a", "reasoning_content": "b"},
            "messages[1]: reasoning_content and reasoning are different thoughts",
        ),
        (
            {**ANSWER, "train": True, "weight": 0},
            "messages[1]: weight and train say different weights",
        ),
        ({**ANSWER, "loss": 2.5}, "messages[1].loss: must be true or false (got float)"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(message: dict[str, Any], problem: str):
    assert problem_of({"messages": [USER, message]}).problem == problem


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({**USER, "reasoning_content": "a"}, "messages[0]: only an assistant thinks (role user)"),
        (
            {**USER, "train": True},
            "messages[0].train: only an assistant's message is trained (role user)",
        ),
        (
            {"role": "user", "content": {"parts": [{"text": "?"}]}, "reasoning": "a"},
            "messages[0].reasoning: the content has parts of its own",
        ),
    ],
)
def test_fields_of_an_assistant_on_another_are_refused(message: dict[str, Any], problem: str):
    assert problem_of({"messages": [message, ANSWER]}).problem == problem


def parts_of(*texts: str, **others: Any) -> list[dict[str, Any]]:
    """As OpenAI's API has a content, with every field, as Arrow has it."""
    return [{"type": "text", "text": text, "image_url": None, **others} for text in texts]


def test_content_of_one_part_of_text_is_that_text():
    row = {
        "messages": [
            {"role": "system", "content": parts_of("be brief")},
            {**USER, "content": parts_of(USER["content"])},
            {"role": "assistant", "content": [], "tool_calls": [RAIN]},
            output("", "call_rain") | {"content": parts_of("3 mm")},
            {**ANSWER, "content": parts_of(ANSWER["content"])},
        ]
    }
    system, user, calls, tool, answer = conversation_of(row).messages
    assert (system.content, user.content) == ("be brief", USER["content"])
    assert (calls.content, len(calls.tool_calls)) == ("", 1)
    assert (tool.content, answer.content) == ("3 mm", ANSWER["content"])


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "'image_url'"),
        ({"type": "image", "image": "x.png"}, "'image'"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "'input_audio'"),
        ({"text": "x"}, "None"),
    ],
)
def test_content_with_a_part_that_is_no_text_is_refused_by_its_type(
    part: dict[str, Any], kind: str
):
    row = {"messages": [{**USER, "content": [*parts_of("What is this?"), part]}, ANSWER]}
    bad = problem_of(row)
    assert bad.problem == (f"messages[0].content[1]: a part of type {kind}, and only text is read")
    assert "images, audio or video" in str(bad.hint)
    check_columns(row)


def test_content_of_several_texts_is_refused_as_nothing_says_how_to_join_them():
    bad = problem_of({"messages": [{**USER, "content": parts_of("a", "b")}, ANSWER]})
    assert bad.problem.startswith("messages[0].content: 2 parts of text, and servers differ")
    assert "parts_joined_by" in str(bad.hint)


@pytest.mark.parametrize("between", ["", "\n"])
def test_content_of_several_texts_is_joined_as_the_settings_say(between: str):
    row = {"messages": [{**USER, "content": parts_of("a", "b")}, ANSWER]}
    read = conversation_of(row, message_fields={"parts_joined_by": between})
    assert read.messages[0].content == f"a{between}b"


@pytest.mark.parametrize(
    ("given", "text"),
    [({"mm": 3, "context": "hill"}, '{"mm": 3, "context": "hill"}'), ([1, 2], "[1, 2]"), (3, "3")],
)
def test_output_that_is_a_json_value_is_its_text(given: Any, text: str):
    messages = [USER, calling(RAIN), output(given, "call_rain"), ANSWER]
    assert outputs_of(*messages[1:3]) == [(text, "call_rain")]
    check_columns({"messages": messages})


def test_output_with_a_null_is_refused_as_arrow_may_have_filled_it():
    bad = problem_of({"messages": [USER, calling(RAIN), output({"mm": None}), ANSWER]})
    assert bad.problem.startswith("messages[2].content: holds a null")
    assert "as JSON text" in str(bad.hint)


def test_system_message_that_is_said_twice_is_one():
    system = {"role": "system", "content": "be brief"}
    once = conversation_of({"messages": [system, USER, ANSWER]})
    assert conversation_of({"messages": [system, system, USER, ANSWER]}) == once
    assert conversation_of({"messages": [system, USER, ANSWER], "system": "be brief "}) == once
    other = {"messages": [system, {**system, "content": "be long"}, USER, ANSWER]}
    assert problem_of(other).problem == "messages[1]: a system message stands first, and once"


def test_content_part_fields_that_nothing_reads_are_counted_or_refused():
    kept = {"messages": [{**USER, "content": parts_of("a", cache="short")}, ANSWER]}
    assert check_columns(kept)["messages[].content[].cache"] == 1
    row = {"messages": [{**USER, "content": parts_of("a", image="x.png")}, ANSWER]}
    with pytest.raises(BadRow, match=r"messages\[0\]\.content\[0\]\.image is not read"):
        check_columns(row)
