"""What is wrong with a row that can't be read: a reason and one clear line."""

from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import BadRow

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "be brief"}
OTHER = {"role": "assistant", "content": "3"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
DEEP = {"name": "f", "arguments": "[" * 9999}
OUTPUT = {"role": "tool", "content": "2"}


def verdict(row: dict[str, Any], first: dict[str, Any] | None = None) -> BadRow:
    """first: the file's first row, where it is another."""
    with pytest.raises(BadRow) as bad:
        found = recognise(first or row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
        parse(row, found, train_on="all_turns", train_on_thoughts=True)
    return bad.value


@pytest.mark.parametrize(
    ("row", "reason", "problem"),
    [
        ({"prompt": None, "completion": "2"}, "columns", "prompt: must be a string (got null)"),
        ({"prompt": 3, "completion": "2"}, "columns", "prompt: must be a string (got int)"),
        ({"prompt": {}, "completion": "2"}, "columns", "prompt: must be a string (got object)"),
        ({"prompt": " ", "completion": "2"}, "empty", "prompt: is empty"),
        ({"prompt": "?", "completion": ""}, "empty", "completion: is empty"),
        ({"prompt": "?", "completion": " \n"}, "empty", "completion: is empty"),
        ({"prompt": "?", "completion": []}, "empty", "completion: is empty"),
        ({"prompt": "?", "completion": [USER]}, "roles", "completion[0]: user follows user"),
        ({"prompt": [USER, ASSISTANT], "completion": "2"}, "roles", "completion: assistant foll"),
        ({"instruction": "a", "input": 3, "output": "b"}, "columns", "input: must be a string (g"),
        ({"text": "\n"}, "empty", "text: is empty"),
        ({"text": None}, "columns", "text: must be a string (got null)"),
        ({"messages": None}, "columns", "messages: must be a list of messages"),
        ({"messages": "hello"}, "columns", "messages: must be a list of messages"),
        ({"messages": []}, "columns", "messages: must be a list of messages"),
        ({"messages": [USER]}, "untrained", "messages: no assistant message to train on"),
        ({"messages": [SYSTEM]}, "untrained", "messages: no assistant message to train on"),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            "untrained",
            "messages: no assistant message to train on",
        ),
        ({"messages": [USER, "2"]}, "columns", "messages[1]: must be an object (got string)"),
        (
            {"messages": [USER, {"content": "2"}]},
            "columns",
            "messages[1]: no column 'role'; the row has: content",
        ),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "columns",
            "messages[1]: no column 'content'; the row has: role",
        ),
        (
            {"messages": [{"role": "alien", "content": "?"}]},
            "roles",
            "messages[0].role: must be one of user, human, assistant, gpt, bot, chatbot, model, "
            "system, developer, tool, function, observation, function_call (got 'alien')",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "columns",
            "messages[1].content: must be a string (got null)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"text": "2"}]}]},
            "columns",
            "messages[1].content[0]: a part of type None, and only text is read",
        ),
        ({"messages": [USER, {**ASSISTANT, "content": "\t"}]}, "empty", "messages[1].content: is"),
        ({"messages": [{**USER, "content": ""}, ASSISTANT]}, "empty", "messages[0].content: is em"),
        ({"messages": [ASSISTANT]}, "roles", "messages[0]: assistant follows nothing"),
        ({"messages": [SYSTEM, ASSISTANT]}, "roles", "messages[1]: assistant follows system"),
        ({"messages": [USER, USER, ASSISTANT]}, "roles", "messages[1]: user follows user"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "roles", "messages[2]: assistant follows as"),
        (
            {"messages": [USER, SYSTEM, ASSISTANT]},
            "roles",
            "messages[1]: a system message stands first, and once",
        ),
        (
            {"messages": [SYSTEM, {**SYSTEM, "content": "be long"}, USER, ASSISTANT]},
            "roles",
            "messages[1]: a system message stands first, and once",
        ),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "x"}, "roles", "system: the messages h"),
        (
            {"messages": [USER, OUTPUT, ASSISTANT]},
            "tool-call",
            "messages[1]: a tool's output without a call before it",
        ),
        ({"messages": [USER, CALLING, OUTPUT, OUTPUT]}, "tool-call", "messages[3]: a tool's outp"),
        ({"messages": [USER, CALLING, ASSISTANT]}, "roles", "messages[2]: assistant follows ass"),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "tool-call",
            "messages[1].tool_calls[0].arguments: malformed JSON",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "[]"}]}]},
            "tool-call",
            "messages[1].tool_calls[0].arguments: must be a JSON object",
        ),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]},
            "tool-call",
            "messages[0]: only an assistant calls tools (role user)",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": 3}]},
            "columns",
            "messages[1].reasoning_content: must be a string (got int)",
        ),
        (
            {
                "messages": [
                    USER,
                    {**CALLING, "tool_calls": [{"name": "f", "arguments": "[" * 9999}]},
                ]
            },
            "tool-call",
            "messages[1].tool_calls[0].arguments: nested more than 100 levels deep",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"arguments": {}}]}]},
            "columns",
            "messages[1].tool_calls[0].name: must be a string (got null)",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "columns", "tools[0].name: must be a str"),
        ({"messages": [USER, ASSISTANT], "tools": "[{"}, "tool-call", "tools: malformed JSON"),
        ({"prompt": "?", "chosen": "2", "rejected": ""}, "empty", "rejected: is empty"),
        (
            {"chosen": "2", "rejected": "3"},
            "columns",
            "no column 'prompt'; the row has: chosen, re",
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
            "untrained",
            "chosen and rejected are the same",
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "x"}, OTHER]},
            "roles",
            "chosen[0]: the prompts of chosen and rejected differ",
        ),
        (
            {"prompt": "x", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            "columns",
            "prompt: is not what chosen and rejected begin with",
        ),
        (
            {"prompt": "?", "chosen": "2", "rejected": "3", "chosen_reward": float("nan")},
            "columns",
            "chosen_reward: must be a finite number (got nan)",
        ),
        (
            {"prompt": "?", "chosen": "2", "rejected": "3", "ref_chosen_logprob": -(10**400)},
            "columns",
            "ref_chosen_logprob: must be a finite number (got -1000000",
        ),
    ],
)
def test_bad_row_has_a_reason_and_a_problem(row: dict[str, Any], reason: str, problem: str):
    bad = verdict(row)
    assert bad.reason == reason
    assert bad.problem.startswith(problem)
    assert "\n" not in bad.problem


@pytest.mark.parametrize(
    "unasked",
    [{"rejected_avg_rating": float("nan")}, {"prompt_hash": 10**400}, {"chosen_rating": None}],
)
def test_figure_that_nobody_asked_for_may_be_anything(unasked: dict[str, Any]):
    row = {"prompt": "?", "chosen": "2", "rejected": "3", "chosen_reward": 1.5}
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    [pair] = parse(row | unasked, found, train_on="all_turns", train_on_thoughts=True)
    assert pair.figures == {"chosen_reward": 1.5}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "?", "completion": "2"},
            "no column 'messages'; the row has: prompt, completion",
        ),
        ({}, "no column 'messages'; the row has: no column"),
        ({"messages": None}, "messages: must be a list (got null)"),
        ({"messages": {"role": ["user"]}}, "messages: must be a list (got object)"),
    ],
)
def test_bad_row_may_be_unlike_the_first(row: dict[str, Any], problem: str):
    bad = verdict(row, first={"messages": [USER, ASSISTANT]})
    assert (bad.reason, bad.problem) == ("columns", problem)


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (-1, "messages[1].weight: must be >= 0 (got -1)"),
        (True, "messages[1].weight: must be a finite number (got boolean)"),
        ("1", "messages[1].weight: must be a finite number (got string)"),
        (float("inf"), "messages[1].weight: must be a finite number (got float)"),
    ],
)
def test_bad_row_may_have_a_weight_that_is_none(weight: Any, problem: str):
    bad = verdict({"messages": [USER, {**ASSISTANT, "weight": weight}]})
    assert (bad.reason, bad.problem) == ("columns", problem)
