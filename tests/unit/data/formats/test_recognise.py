"""Which format a file has, and which setting decides where that is not clear."""

from typing import Any

import pytest

from post_training.core.errors import UsageError
from post_training.data.config import DatasetConfig
from post_training.data.formats.columns import Format
from post_training.data.formats.recognise import check_same, parse, recognise
from post_training.data.rows import BadRow, Conversation

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}


def found_in(row: dict[str, Any], **settings: Any) -> Format:
    return recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")


@pytest.mark.parametrize(
    ("row", "settings", "problem", "hint"),
    [
        (
            {"a": 1, "b": 2},
            {},
            "unknown columns: a, b; known: messages: messages; messages: conversations; "
            "prompt_completion: prompt, completion;",
            "columns: {prompt: …, completion: …}",
        ),
        (
            {"mesages": [USER, ASSISTANT], "id": 1},
            {},
            "unknown columns: mesages, id, did you mean messages (of format messages)?",
            "columns: {messages: mesages}",
        ),
        (
            {"qestion": "a", "answer": "b"},
            {},
            "unknown columns: qestion, answer, did you mean question (of format prompt_completion)",
            "columns: {prompt: qestion, completion: answer}",
        ),
        (
            {"messages": [], "text": "x"},
            {},
            "its columns make up several formats: messages: messages; text: text",
            "format: messages | text",
        ),
        (
            {"question": "a", "answer": "b", "response": "c"},
            {},
            "its columns make up several formats: prompt_completion: question, answer; "
            "prompt_completion: question, response",
            "columns: {prompt: question, completion: answer} | "
            "columns: {prompt: question, completion: response}",
        ),
        (
            {"question": "a"},
            {"format": "alpaca"},
            "no columns of format alpaca; the row has: question; known: alpaca: instruction, out",
            "columns: {instruction: …, output: …}",
        ),
        (
            {"question": "a", "answer": "b"},
            {"columns": {"prompt": "questoin", "completion": "answer"}},
            "columns.prompt: no column 'questoin' in this row; it has: question, answer, did you "
            "mean 'question'?",
            None,
        ),
        (
            {"messages": [{"speaker": "user", "text": "x"}]},
            {},
            "unknown fields of a message: speaker, text; known: role, content; from, value",
            "message_fields: {role: …, content: …}",
        ),
        (
            {"messages": [{"role": "user", "from": "user", "content": "x", "value": "x"}]},
            {},
            "several names for the fields of a message: role, from, content, value;",
            "message_fields: {role: …, content: …}",
        ),
        (
            {"messages": [USER]},
            {"message_fields": {"role": "speaker"}},
            "unknown fields of a message: role, content",
            "message_fields",
        ),
    ],
)
def test_recognise_says_which_setting_decides(
    row: dict[str, Any], settings: dict[str, Any], problem: str, hint: str | None
):
    with pytest.raises(UsageError) as error:
        found_in(row, **settings)
    assert error.value.problem.startswith(problem)
    assert error.value.where == "rows.jsonl:1"
    assert (hint or "None") in str(error.value.hint)


def test_recognise_leaves_a_row_that_can_not_tell_to_the_next():
    with pytest.raises(BadRow, match="messages: must be a list of messages"):
        found_in({"messages": []})


def test_recognise_ignored_column_makes_up_no_format():
    row = {"messages": [USER, ASSISTANT], "text": "x"}
    assert found_in(row, ignore=["text"]).name == "messages"
    check_same(row, found_in(row, ignore=["text"]), DatasetConfig(path="x", ignore=["text"]))


@pytest.mark.parametrize(
    ("first", "later", "others"),
    [
        ({"messages": [USER]}, {"messages": [USER], "text": "x"}, "text (text)"),
        (
            {"question": "a", "answer": "b"},
            {"question": "a", "answer": "b", "response": "c"},
            "prompt_completion (question, response)",
        ),
        ({"messages": [USER]}, {"text": "x"}, "text (text)"),
    ],
)
def test_recognise_later_row_of_another_format_is_refused(
    first: dict[str, Any], later: dict[str, Any], others: str
):
    found = found_in(first)
    check_same(first, found, DatasetConfig(path="rows.jsonl"))
    with pytest.raises(BadRow) as bad:
        check_same(later, found, DatasetConfig(path="rows.jsonl"))
    assert bad.value.problem.startswith(f"its columns make up {others}")
    check_same(later, found, DatasetConfig(path="rows.jsonl", columns=found.columns))


def test_recognise_named_columns_are_the_only_ones_read():
    row = {"messages": [USER, ASSISTANT], "tools": ["hammer"], "system": "Linux"}
    found = found_in(row, columns={"messages": "messages"})
    assert found.describe() == "messages (messages: role, content)"
    [conversation] = parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert isinstance(conversation, Conversation)
    assert len(conversation.messages) == 2
    assert conversation.tools == ()


def test_recognise_optional_column_may_come_in_a_later_row():
    found = found_in({"instruction": "Say it.", "output": "it"})
    later = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    [conversation] = parse(later, found, train_on="all_turns", train_on_thoughts=True)
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0].content == "Translate.\n\nHund"


def test_prompts_alone_are_recognised_where_nothing_is_trained():
    dataset = DatasetConfig(path="rows.jsonl")
    for row in ({"prompt": "1 + 1?"}, {"prompt": [USER], "answer": "2"}):
        found = recognise(row, dataset, "rows.jsonl:1", for_training=False)
        assert (found.name, found.columns) == ("prompt", {"prompt": "prompt"})
        with pytest.raises(UsageError, match="unknown columns: prompt"):
            recognise(row, dataset, "rows.jsonl:1")
    with pytest.raises(UsageError) as error:
        recognise({"frage": "1 + 1?"}, dataset, "rows.jsonl:1", for_training=False)
    assert "or those of prompts alone: columns: {prompt: …}" in str(error.value.hint)
    answered = recognise({"prompt": "a", "completion": "b"}, dataset, "x:1", for_training=False)
    assert answered.name == "prompt_completion"
