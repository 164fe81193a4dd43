"""Rows of every format become a prompt with its branches, which read back as what they were."""

import json
from typing import Any

import pytest

from post_training.data.branches import (
    branch_row,
    conversations_of,
    new_branch,
    prompt_of,
    row_id,
    row_line,
)
from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import COMPLETION, PROMPT, BadRow, Message, ToolCall

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
TOOL = {"name": "add", "description": "a sum", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def converted(row: dict[str, Any], **settings: Any) -> dict[str, Any]:
    found = recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")
    return branch_row(row, found, "rows")


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"question": "1 + 1?", "answer": "2"}, ["2"]),
        ({"messages": [USER, ASSISTANT]}, ["2"]),
        ({"messages": [USER]}, []),
        ({"instruction": "1 + 1?", "output": "2"}, ["2"]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ["2"]),
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, ["2", "3"]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "3"}]},
         ["2", "3"]),
        ({"initial_prompt": USER, "conversation_branches": [{"messages": [ASSISTANT]}]}, ["2"]),
    ],
)  # fmt: skip
def test_branch_row_of_each_format_has_one_prompt_and_id(row, answers):
    result = converted(row)
    assert prompt_of(result).messages == (Message("user", "1 + 1?"),)
    assert [c.messages[1:] for c in conversations_of(result)] == [
        (Message("assistant", answer, COMPLETION),) for answer in answers
    ]
    assert (
        result["conversation_id"]
        == converted({"question": "1 + 1?", "answer": "?"})["conversation_id"]
    )
    assert next(iter(result)) == "conversation_id"


def test_branch_row_of_a_prompt_alone_has_no_branch():
    row = converted({"question": "1 + 1?", "level": 2}, columns={"prompt": "question"})
    assert prompt_of(row).messages == (Message("user", "1 + 1?"),)
    assert row["conversation_branches"] == []
    assert row["original_metadata"] == {"level": 2}
    row = converted({"prompt": [USER], "completion": "2"}, format="prompt")
    assert row["original_metadata"] == {"completion": "2"}


def test_branch_row_reads_back_thoughts_calls_and_further_turns():
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        ASSISTANT,
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    row = converted({"messages": messages, "tools": [TOOL], "id": 17})
    assert row["original_metadata"] == {"id": 17}
    assert [m["role"] for m in row["conversation_branches"][0]["messages"]] == [
        "assistant",
        "user",
        "assistant",
    ]
    [conversation] = conversations_of(row)
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "1 + 1?"),
        Message("assistant", "", COMPLETION, thought="hm",
                tool_calls=(ToolCall("add", '{"a": 1}'),)),
        Message("tool", "2"),
        Message("assistant", "2", COMPLETION),
        Message("user", "sure?"),
        Message("assistant", "yes", COMPLETION),
    )  # fmt: skip
    assert row["available_functions"] == [TOOL]
    assert prompt_of(row).tools == conversation.tools
    [tool] = conversation.tools
    assert json.loads(tool) == {"type": "function", "function": TOOL}
    assert all(message.kind == PROMPT for message in prompt_of(row).messages)


def test_branch_row_of_a_prompt_of_several_turns_has_them_as_context():
    prompt = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        ASSISTANT,
        {"role": "user", "content": "sure?"},
    ]
    expected = (
        Message("system", "Be brief."),
        Message("user", "1 + 1?"),
        Message("assistant", "", thought="hm", tool_calls=(ToolCall("add", '{"a": 1}'),)),
        Message("tool", "2"),
        Message("assistant", "2"),
        Message("user", "sure?"),
    )
    sides = {"chosen": [{"role": "assistant", "content": "yes"}],
             "rejected": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    for answers in ({}, {"completion": "yes"}, sides):
        settings = {} if answers else {"format": "prompt"}
        row = converted({"prompt": prompt, "tools": [TOOL], **answers}, **settings)
        assert prompt_of(row).messages == expected
        told = [conversation.messages for conversation in conversations_of(row)]
        assert told == [
            (*expected, Message("assistant", text, COMPLETION))
            for text in ("yes", "no")[: len(answers)]
        ]
        assert row["initial_prompt"]["content"] == "sure?"
        assert [message["role"] for message in row["earlier_messages"]] == ["user", "assistant"]
    other = [*prompt[:2], {**prompt[2], "reasoning_content": "well"}, *prompt[3:]]
    for changed in (other, prompt[-1:]):
        another = converted({"prompt": changed, "tools": [TOOL], **sides})
        assert another["conversation_id"] != row["conversation_id"]


def test_earlier_turns_of_a_branch_row_are_not_trained():
    row = converted({"prompt": [USER, ASSISTANT, USER], "completion": "2"})
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    [conversation] = parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert [message.kind for message in conversation.messages] == [
        PROMPT, PROMPT, PROMPT, COMPLETION,
    ]  # fmt: skip


def test_branch_row_keeps_all_that_a_row_of_the_format_holds():
    row = {
        "conversation_branches": [
            {"messages": [ASSISTANT], "is_reference_completion": True, "reward": 0.25},
        ],
        "initial_prompt": USER,
        "conversation_id": "one",
        "dataset_source": "gsm8k",
        "created_timestamp": 3,
    }
    assert converted(row) == row
    assert len(conversations_of(converted(row))) == 1


def test_branch_row_of_another_system_prompt_has_another_id():
    one = converted({"question": "a?", "answer": "b"})
    other = converted({"question": "a?", "answer": "b", "system": "Be brief."})
    assert one["conversation_id"] != other["conversation_id"]


def test_branch_row_keeps_what_a_reward_compares_with():
    row = converted({"question": "a?", "answer": "b #### 7", "level": 3})
    assert row["original_metadata"] == {"answer": "b #### 7", "level": 3}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a document"}, "rows of format text have no prompt"),
        (
            {"prompt": [USER, ASSISTANT], "completion": [USER]},
            r"prompt\[1\]: a prompt ends with a message of the user",
        ),
        ({"messages": [{"role": "developer", "content": "x"}, USER, ASSISTANT]}, "a developer's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no message of a user"),
        ({"initial_prompt": USER, "conversation_branches": [{"messages": [USER]}]}, "user follows"),
        ({"initial_prompt": USER, "conversation_branches": [{}]}, "must be a list"),
        ({"initial_prompt": USER, "conversation_branches": [], "conversation_id": 7}, "a string"),
    ],
)
def test_branch_row_refuses_what_has_no_place(row, problem):
    with pytest.raises(BadRow, match=problem):
        converted(row)


@pytest.mark.parametrize("text", [" c\n", "", "\n"])
def test_new_branch_reads_back_as_its_text(text):
    row = converted({"question": "a?", "answer": "b"})
    row["conversation_branches"].append(new_branch(text, is_reference=True, metadata={}))
    assert conversations_of(row)[1].messages[1] == Message("assistant", text, COMPLETION)


def test_only_a_model_may_have_said_nothing():
    row = converted({"question": "a?", "answer": "b"})
    row["conversation_branches"].append(new_branch("", is_reference=False, metadata={}))
    with pytest.raises(BadRow, match="is empty"):
        conversations_of(row)


def test_row_line_refuses_what_json_can_not_hold():
    with pytest.raises(BadRow, match="lone surrogate"):
        row_line({"text": "\ud800"})
    with pytest.raises(BadRow, match="not json compliant"):
        row_line({"reward": float("nan")})


@pytest.mark.parametrize("given", ["plain", 'a "quoted" \\ one', "ü ☃ \u2028", "conversation_id"])
def test_row_id_is_read_without_the_rest(given):
    row = {"conversation_id": given, "initial_prompt": USER, "conversation_branches": []}
    assert row_id(row_line(converted(row))) == given
    # A stage may move it.
    assert row_id(row_line({"conversation_branches": [], "conversation_id": given})) == given
