import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.core.errors import PostTrainingError
from post_training.data.config import Columns, DatasetConfig
from post_training.data.conversations import Conversation, Message, read_conversations

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}


def read(tmp_path: Path, *rows: Any, columns: dict[str, str] | None = None) -> list[Conversation]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(
        read_conversations([DatasetConfig(path=path, columns=columns and Columns(**columns))])
    )


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [USER, ASSISTANT]}, None),
        ({"prompt": "1 + 1?", "completion": "2"}, None),
        ({"prompt": [USER], "completion": "2"}, None),
        ({"prompt": "1 + 1?", "completion": [ASSISTANT]}, None),
        ({"question": "1 + 1?", "answer": "2"}, {"prompt": "question", "completion": "answer"}),
        ({"chat": [USER, ASSISTANT]}, {"messages": "chat"}),
        ({"messages": [USER, ASSISTANT], "prompt": "x", "id": 3, "score": None}, None),
    ],
)
def test_read_conversations_formats_give_one_row_type(
    row: dict[str, Any], columns: dict[str, str] | None, tmp_path: Path
):
    [conversation] = read(tmp_path, row, columns=columns)
    assert conversation.messages == (
        Message("user", "1 + 1?", False),
        Message("assistant", "2", True),
    )
    assert conversation.where == f"{tmp_path / 'rows.jsonl'}:1"


def test_read_conversations_assistant_in_a_prompt_is_not_trained(tmp_path: Path):
    system = {"role": "system", "content": "be brief"}
    row = {"prompt": [system, USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    [conversation] = read(tmp_path, row)
    assert [message.trained for message in conversation.messages] == [False] * 4 + [True]


def test_read_conversations_every_assistant_of_messages_is_trained(tmp_path: Path):
    [conversation] = read(tmp_path, {"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert [message.trained for message in conversation.messages] == [False, True, False, True]


def test_read_conversations_files_follow_one_another(tmp_path: Path):
    datasets = []
    for name in ("b", "a"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name}{n}", "completion": "x"} for n in range(2)]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        datasets.append(DatasetConfig(path=path))
    prompts = [item.messages[0].content for item in read_conversations(datasets)]
    assert prompts == ["b0", "b1", "a0", "a1"]


PAIR = {"prompt": "question", "completion": "answer"}
MESSAGES = {"messages": "messages"}


@pytest.mark.parametrize(
    ("row", "columns", "problem"),
    [
        ({"answer": "2"}, PAIR, "no column 'question'; the row has: answer"),
        ({}, PAIR, "no column 'question'; the row has: no column"),
        ({"question": None, "answer": "2"}, PAIR, "question: must be a string (got null)"),
        ({"question": 3, "answer": "2"}, PAIR, "question: must be a string (got int)"),
        ({"question": {}, "answer": "2"}, PAIR, "question: must be a string (got dict)"),
        ({"question": " ", "answer": "2"}, PAIR, "question: is empty"),
        ({"question": "?", "answer": ""}, PAIR, "answer: is empty"),
        ({"question": "?", "answer": " \n"}, PAIR, "answer: is empty"),
        ({"question": "?", "answer": []}, PAIR, "answer: is empty"),
        ({"question": "?", "answer": [USER]}, PAIR, "answer: no assistant message to train on"),
        ({"messages": None}, MESSAGES, "messages: must be a list (got null)"),
        ({"messages": "hello"}, MESSAGES, "messages: must be a list (got str)"),
        ({"messages": []}, MESSAGES, "messages: is empty"),
        ({"messages": [USER]}, MESSAGES, "messages: no assistant message to train on"),
        (
            {"messages": [USER, "2"]},
            MESSAGES,
            "messages[1]: must be an object with role and content (got str)",
        ),
        (
            {"messages": [{"content": "2"}]},
            MESSAGES,
            "messages[0]: no column 'role'; the row has: content",
        ),
        (
            {"messages": [{"role": "user"}]},
            MESSAGES,
            "messages[0]: no column 'content'; the row has: role",
        ),
        (
            {"messages": [{"role": "human", "content": "?"}]},
            MESSAGES,
            "messages[0].role: must be one of system, user, assistant (got 'human')",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            MESSAGES,
            "messages[1].content: must be a string (got null)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"text": "2"}]}]},
            MESSAGES,
            "messages[1].content: must be a string (got list)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}, USER, ASSISTANT]},
            MESSAGES,
            "messages[1].content: is empty",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "sum"}]}]},
            MESSAGES,
            "messages[1].tool_calls: tool calls are not supported",
        ),
        (
            {"instruction": "?", "output": "2"},
            None,
            "unknown columns: instruction, output; known: messages, or prompt and completion",
        ),
        (
            {"messages": [USER, ASSISTANT], "prompt": "?", "completion": "2"},
            None,
            "both messages and prompt, completion are there",
        ),
    ],
)
def test_read_conversations_bad_row_is_refused_with_its_line(
    row: dict[str, Any], columns: dict[str, str] | None, problem: str, tmp_path: Path
):
    with pytest.raises(PostTrainingError) as error:
        read(tmp_path, row, columns=columns)
    assert error.value.problem == problem
    assert error.value.where == f"{tmp_path / 'rows.jsonl'}:1"


def test_read_conversations_row_in_another_format_than_the_first_is_refused(tmp_path: Path):
    first, second = {"messages": [USER, ASSISTANT]}, {"prompt": "?", "completion": "2"}
    with pytest.raises(PostTrainingError) as error:
        read(tmp_path, first, second)
    assert str(error.value) == (
        f"{tmp_path / 'rows.jsonl'}:2: no column 'messages'; the row has: prompt, completion"
    )


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"prompt": "question"},
        {"completion": "answer"},
        {"messages": "chat", "completion": "answer"},
        {"question": "prompt"},
    ],
)
def test_columns_that_are_no_format_are_refused(columns: dict[str, str]):
    with pytest.raises(ValidationError):
        Columns(**columns)
