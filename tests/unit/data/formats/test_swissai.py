"""SwissAI's branch format."""

from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import (
    COMPLETION,
    EXCLUDED,
    BadRow,
    Conversation,
    Message,
    Row,
    ToolCall,
)

FUNCTION = {"name": "weather", "description": "of a place", "parameters": {"type": "object"}}
FUNCTION_TEXT = '{"name": "weather", "description": "of a place", "parameters": {"type": "object"}}'


def part(kind: str, content: str | None = "", **fields: Any) -> dict[str, Any]:
    """With every field, as Arrow has it."""
    return {"type": kind, "content": content, "metadata": {}, "name": "", "args": ""} | fields


def assistant(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "parts": list(parts)}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "parts": [part("response", text)]}


def row(*branches: Any, **columns: Any) -> dict[str, Any]:
    return {
        "conversation_id": "1",
        "system_prompt": {"content": "be brief", "metadata": {}},
        "initial_prompt": {"role": "user", "content": "Bern?", "metadata": {}},
        "available_functions": [],
        "conversation_branches": [
            branch if isinstance(branch, dict) else {"messages": branch} for branch in branches
        ],
    } | columns


def read(value: dict[str, Any], *, train_on_thoughts: bool = True) -> list[Row]:
    found = recognise(value, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    return parse(value, found, train_on="all_turns", train_on_thoughts=train_on_thoughts)


OPENING = (Message("system", "be brief"), Message("user", "Bern?"))
CALL = part("function-call", name="weather", args='{"place": "Bern"}')
OUTPUT = part("function-output", "sunny")
SUNNY = part("response", "It is sunny.")


def test_swissai_is_recognised_by_its_columns():
    found = recognise(row(), DatasetConfig(path="x.jsonl"), "x.jsonl:1")
    assert found.describe() == "swissai (initial_prompt, conversation_branches)"


def test_swissai_turn_thinks_calls_and_answers():
    value = row(
        [assistant(part("thought", "let me see"), CALL, OUTPUT, SUNNY), user("thanks")],
        available_functions=[FUNCTION],
    )
    call = ToolCall("weather", '{"place": "Bern"}')
    assert read(value) == [
        Conversation(
            (
                *OPENING,
                Message("assistant", "", COMPLETION, thought="let me see", tool_calls=(call,)),
                Message("tool", "sunny"),
                Message("assistant", "It is sunny.", COMPLETION),
                Message("user", "thanks"),
            ),
            (f'{{"type": "function", "function": {FUNCTION_TEXT}}}',),
        )
    ]


def test_swissai_thoughts_can_be_left_untrained():
    value = row([assistant(part("thought", "let me see"), SUNNY)])
    [conversation] = read(value, train_on_thoughts=False)
    assert isinstance(conversation, Conversation)
    assert conversation.messages[2:] == (
        Message("assistant", "", EXCLUDED, thought="let me see"),
        Message("assistant", "It is sunny.", COMPLETION),
    )


def test_swissai_parallel_calls_get_an_output_each():
    value = row([assistant(CALL, CALL, OUTPUT, part("function-output", None), SUNNY)])
    [conversation] = read(value)
    assert isinstance(conversation, Conversation)
    roles = [message.role for message in conversation.messages[2:]]
    assert roles == ["assistant", "tool", "tool", "assistant"]
    assert len(conversation.messages[2].tool_calls) == 2
    assert [message.content for message in conversation.messages[3:5]] == ["sunny", ""]


def test_swissai_responses_and_thoughts_keep_their_order():
    parts = [part("response", "a"), part("thought", "b"), part("response", "c"), CALL]
    [conversation] = read(row([assistant(*parts)]))
    assert isinstance(conversation, Conversation)
    assert [
        (message.thought, message.content, len(message.tool_calls))
        for message in conversation.messages[2:]
    ] == [(None, "a", 0), ("b", "c", 1)]


def test_swissai_answers_that_can_be_checked_are_a_call():
    value = row([assistant(SUNNY, part("verifiable-responses", answers=["sunny"]))])
    [conversation] = read(value)
    assert isinstance(conversation, Conversation)
    call = ToolCall("display_answers", '{"answers": ["sunny"]}')
    assert conversation.messages[2:] == (
        Message("assistant", "It is sunny.", COMPLETION, tool_calls=(call,)),
        Message("tool", '"Answers displayed"'),
    )
    [tool] = conversation.tools
    assert '"name": "display_answers"' in tool


def test_swissai_each_branch_that_is_not_for_reference_is_a_row():
    def branch(text: str, **fields: Any) -> dict[str, Any]:
        return {"messages": [assistant(part("response", text))]} | fields

    older = {
        "messages": [assistant(part("response", "4", metadata={"is_reference_completion": 1}))]
    }
    value = row(
        branch("1", is_reference_completion=False),
        branch("2", is_reference_completion=True),
        branch("3"),
        older,
    )
    rows = read(value)
    answers = [each.messages[-1].content for each in rows if isinstance(each, Conversation)]
    assert answers == ["1", "3"]


def test_swissai_older_messages_have_a_content():
    messages = [
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "no"},
    ]
    [conversation] = read(row(messages, system_prompt=None))
    assert isinstance(conversation, Conversation)
    assert [message.content for message in conversation.messages] == ["Bern?", "yes", "sure?", "no"]


def test_swissai_developer_may_speak_first():
    prompt = {"role": "developer", "content": "answer in German"}
    [conversation] = read(row([user("Bern?"), assistant(SUNNY)], initial_prompt=prompt))
    assert isinstance(conversation, Conversation)
    roles = [message.role for message in conversation.messages]
    assert roles == ["system", "developer", "user", "assistant"]


def test_swissai_parameters_that_arrow_made_text_of_are_read():
    parameters = {"type": "object", "properties": '{"place": {"type": "string"}}'}
    functions = [{"name": "f", "parameters": parameters}, {"name": "g", "parameters": "{}"}]
    [conversation] = read(row([assistant(SUNNY)], available_functions=functions))
    assert isinstance(conversation, Conversation)
    assert conversation.tools == (
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", '
        '"properties": {"place": {"type": "string"}}}}}',
        '{"type": "function", "function": {"name": "g", "parameters": {}}}',
    )


@pytest.mark.parametrize(
    ("value", "reason", "problem"),
    [
        (row(), "untrained", "conversation_branches: no branch that is not for reference"),
        (
            row([assistant(OUTPUT, SUNNY)]),
            "tool-call",
            "conversation_branches[0].messages[0].parts: a tool's output without a call before it",
        ),
        (row([assistant(CALL, OUTPUT, OUTPUT)]), "tool-call", "conversation_branches[0].messages["),
        (row([assistant()]), "empty", "conversation_branches[0].messages[0].parts: is empty"),
        (row([assistant(part("response", " "))]), "empty", "conversation_branches[0].messages[0]."),
        (
            row([assistant(part("image"))]),
            "columns",
            "conversation_branches[0].messages[0].parts[0].type: must be one of response, thought, "
            "function-call, function-output, verifiable-responses (got 'image')",
        ),
        (row([user("again")]), "roles", "conversation_branches[0].messages[0].parts: user follows"),
        (row([assistant(SUNNY)], initial_prompt=None), "columns", "initial_prompt: must be an obj"),
        (row([assistant(part("function-call"))]), "empty", "conversation_branches[0].messages[0]."),
        (
            row([assistant(part("function-call", name="f", args="{'a': 1}"))]),
            "tool-call",
            "conversation_branches[0].messages[0].parts[0].args: malformed JSON",
        ),
        (
            row([assistant(SUNNY), {"role": "user", "parts": [CALL]}]),
            "roles",
            "conversation_branches[0].messages[1].parts: only an assistant thinks and calls",
        ),
    ],
)
def test_swissai_bad_row_gets_a_verdict(value: dict[str, Any], reason: str, problem: str):
    with pytest.raises(BadRow) as bad:
        read(value)
    assert bad.value.reason == reason
    assert bad.value.problem.startswith(problem)
