"""The one row type of conversational data, and the formats it is read from.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…" or messages, "completion": "…" or messages}
    any other column names, by a mapping: Columns(prompt="question", completion="answer")

A prompt that is a string is a user's message, a completion that is one is the assistant's. What is
trained: the assistant's messages of `messages`, and of `completion`; never those of a `prompt`.
Columns that aren't named are ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.config import Columns, DatasetConfig
from post_training.data.jsonl import Row, read_rows

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    trained: bool


@dataclass(frozen=True)
class Conversation:
    """messages: at least one of them is trained. where: `file.jsonl:LINE`, for error messages."""

    messages: tuple[Message, ...]
    where: str


def read_conversations(datasets: list[DatasetConfig]) -> Iterator[Conversation]:
    """Every row of every file, in order. Errors: PostTrainingError at the first bad line."""
    for dataset in datasets:
        yield from _read_file(dataset.path, dataset.columns)


def _read_file(path: Path, columns: Columns | None) -> Iterator[Conversation]:
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        # The first row decides for the whole file; a row in another format is then an error.
        columns = columns or _recognise(row, where)
        yield Conversation(_messages_of(row, columns, where), where)


def _recognise(row: Row, where: str) -> Columns:
    pair = "prompt" in row and "completion" in row
    if "messages" in row and pair:
        raise PostTrainingError(
            "both messages and prompt, completion are there",
            where=where,
            hint="say which to read: columns: {messages: messages}",
        )
    if "messages" in row:
        return Columns(messages="messages")
    if pair:
        return Columns(prompt="prompt", completion="completion")
    raise PostTrainingError(
        f"unknown columns: {_names(row)}; known: messages, or prompt and completion",
        where=where,
        hint="map them in the dataset's settings: columns: {prompt: …, completion: …}",
    )


def _messages_of(row: Row, columns: Columns, where: str) -> tuple[Message, ...]:
    if columns.messages is not None:
        messages = _message_list(row, columns.messages, where, trained=True)
    else:
        assert columns.prompt is not None
        assert columns.completion is not None
        messages = _side(row, columns.prompt, where, role="user", trained=False)
        messages += _side(row, columns.completion, where, role="assistant", trained=True)
    if not any(message.trained for message in messages):
        column = columns.messages or columns.completion
        raise PostTrainingError(f"{column}: no assistant message to train on", where=where)
    return tuple(messages)


def _side(row: Row, column: str, where: str, *, role: str, trained: bool) -> list[Message]:
    """The messages of a prompt or a completion: a string, or a list of messages."""
    if isinstance(row.get(column), list):
        return _message_list(row, column, where, trained=trained)
    text = _text(_value(row, column, where), column, where)
    if not text.strip():
        raise PostTrainingError(f"{column}: is empty", where=where)
    return [Message(role, text, trained)]


def _message_list(row: Row, column: str, where: str, *, trained: bool) -> list[Message]:
    items = _value(row, column, where)
    if not isinstance(items, list):
        raise PostTrainingError(f"{column}: must be a list (got {_kind(items)})", where=where)
    if not items:
        raise PostTrainingError(f"{column}: is empty", where=where)
    return [
        _message(item, f"{column}[{index}]", where, trained) for index, item in enumerate(items)
    ]


def _message(item: Any, key: str, where: str, trained: bool) -> Message:
    if not isinstance(item, dict):
        problem = f"{key}: must be an object with role and content (got {_kind(item)})"
        raise PostTrainingError(problem, where=where)
    role = _text(_value(item, "role", where, key), f"{key}.role", where)
    if role not in ROLES:
        problem = f"{key}.role: must be one of {', '.join(ROLES)} (got {role!r})"
        raise PostTrainingError(problem, where=where)
    # Dropping a call silently would teach the model the text around it alone.
    for call in ("tool_calls", "function_call"):
        if item.get(call):
            raise PostTrainingError(f"{key}.{call}: tool calls are not supported", where=where)
    content = _text(_value(item, "content", where, key), f"{key}.content", where)
    if role == "assistant" and not content.strip():
        raise PostTrainingError(f"{key}.content: is empty", where=where)
    return Message(role, content, trained and role == "assistant")


def _value(row: Row, column: str, where: str, key: str | None = None) -> Any:
    if column not in row:
        problem = f"no column {column!r}; the row has: {_names(row)}"
        raise PostTrainingError(f"{key}: {problem}" if key else problem, where=where)
    return row[column]


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise PostTrainingError(f"{key}: must be a string (got {_kind(value)})", where=where)
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _names(row: Row) -> str:
    return ", ".join(row) or "no column"
