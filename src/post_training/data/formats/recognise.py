"""Which format a dataset's rows have, and how a row of each format is parsed.

    recognise    the format, by the dataset's settings, else by the columns of its first good row
    check_same   whether a later row has that format too, or is refused
    parse        from a row's JSON object to the row type

Nothing is guessed: columns of two formats, or of none, are refused with the setting that decides.
"""

from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

from post_training.config.faults import nearest
from post_training.core.errors import UsageError
from post_training.data.config import FORMATS, DatasetConfig, format_of_columns
from post_training.data.formats.columns import (
    Format,
    names_looked_for,
    read_prompt,
    read_side,
    read_system,
    read_tools_column,
    tools_of,
)
from post_training.data.formats.messages import (
    Entry,
    MessageNames,
    check_turns,
    exclude_thoughts,
    mark_answers,
    mark_as_context,
    read_messages,
)
from post_training.data.formats.preference import read_preference
from post_training.data.formats.swissai import read_branches
from post_training.data.formats.tools import Tools
from post_training.data.formats.values import filled_text, required
from post_training.data.rows import COMPLETION, BadRow, Conversation, Row, Text

PAIRS = (
    ("prompt", "completion"),
    ("inputs", "targets"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("instruction", "response"),
)
# What is looked for where the settings name no columns: (format, {its column: the file's}).
KNOWN: list[tuple[str, dict[str, str]]] = [
    *(("messages", {"messages": column}) for column in ("messages", "conversations")),
    *(
        ("prompt_completion", {"prompt": prompt, "completion": completion})
        for prompt, completion in PAIRS
    ),
    *(
        (name, {column: column for column in FORMATS[name][0]})
        for name in ("alpaca", "text", "preference", "swissai", "prompt")
    ),
]
# The columns that may hold a list of messages.
_LISTS = ("messages", "prompt", "completion", "chosen", "rejected")
_MESSAGE_FIELDS = (("role", "content"), ("from", "value"))


def recognise(
    value: dict[str, Any], dataset: DatasetConfig, where: str, *, for_training: bool = True
) -> Format:
    """The format of the file whose first row is `value`. where: the row's place.

    Where the settings name columns, no others are read. for_training: if not, a prompt needs no
    answer beside it.
    Errors: UsageError where the settings have to say more, or say what is not so; BadRow where
    this row can't tell, so that the next has to.
    """
    ignored = frozenset(dataset.ignore)
    value = {column: cell for column, cell in value.items() if column not in ignored}
    if dataset.columns:
        name, columns = format_of_columns(dataset.columns, dataset.format), dict(dataset.columns)
        _check_there(columns, value, where)
    else:
        name, columns = _by_columns(value, dataset, where, for_training=for_training)
    messages = _message_list(
        [value[columns[name]] for name in _LISTS if columns.get(name) in value]
    )
    if not messages and name == "messages":
        raise BadRow("columns", f"{columns['messages']}: must be a list of messages")
    names = _message_names(messages, dataset, where)
    return Format(
        name,
        columns,
        names,
        {} if dataset.columns else names_looked_for(name, columns, ignored),
        has_messages=bool(messages),
        ignored=ignored,
    )


def check_same(row: dict[str, Any], found: Format, dataset: DatasetConfig) -> None:
    """Errors: BadRow for a row whose columns make up another format than its file's."""
    if dataset.columns:
        return
    own = tuple(found.columns.values())
    there = tuple(found.visible(row))
    others = _others(there, dataset.format, found.name, own)
    if others:
        hint = f"say which to read in the dataset's settings: columns: {_mapping(found.columns)}"
        problem = f"its columns make up {others}; the file is read as {found.describe()}"
        raise BadRow("columns", problem, hint)


def parse(
    value: dict[str, Any],
    found: Format,
    *,
    train_on: Literal["all_turns", "last_turn"],
    train_on_thoughts: bool,
) -> list[Row]:
    """The rows of a JSON object: one, but for the branches of swissai. What is trained of each:

        messages            every turn of the assistant, or the last, or as the messages say
        prompt_completion   the completion's messages, or its text
        alpaca              the output
        text                all of it
        preference          the messages, or text, of chosen and rejected
        swissai             as messages, for each branch that is not for reference
        prompt              nothing: it is for annotation, and refused here

    Columns that a format doesn't name are metadata. One that changes what is said or trained
    elsewhere has been refused before (columns.py: Format.check_columns).
    Errors: BadRow.
    """
    value = found.visible(value)
    match found.name:
        case "text":
            column = found.columns["text"]
            return [Text(filled_text(required(value, column), column))]
        case "prompt":
            raise BadRow("untrained", "a prompt without an answer")
        case "preference":
            return [read_preference(value, found, train_on_thoughts=train_on_thoughts)]
        case "swissai":
            return [
                _conversation(opening, entries, tools, train_on, train_on_thoughts)
                for opening, entries, tools in read_branches(value, found.columns, found.messages)
            ]
    own = read_tools_column(value, found)
    if found.name == "messages":
        column = found.columns["messages"]
        given = required(value, column)
        answers, declared = read_messages(given, column, found.messages, own)
        prompt = []
    else:
        train_on = "all_turns"  # The column says what is trained: all of the completion.
        asked, answered = FORMATS[found.name][0]  # prompt and completion, or as alpaca has it
        prompt, declared = read_prompt(value, found, asked, own)
        answers, _ = read_side(value, found, answered, "assistant", own or declared)
    prompt = read_system(value, found, prompt or answers) + prompt
    tools = tools_of(own, declared, found)
    return [_conversation(prompt, answers, tools, train_on, train_on_thoughts)]


@lru_cache(maxsize=1024)  # Most rows of a file have the same columns.
def _others(row: tuple[str, ...], named: str | None, name: str, own: tuple[str, ...]) -> str:
    return ", ".join(
        f"{known} ({', '.join(columns.values())})"
        for known, columns in _known(named)
        if all(given in row for given in columns.values())
        and (known, tuple(columns.values())) != (name, own)
    )


def _check_there(columns: dict[str, str], value: dict[str, Any], where: str) -> None:
    for column, given in columns.items():
        if given not in value:
            raise UsageError(
                f"columns.{column}: no column {given!r} in this row; it has: "
                f"{_names(value)}{nearest(given, list(value))}",
                where=where,
            )


def _by_columns(
    value: dict[str, Any], dataset: DatasetConfig, where: str, *, for_training: bool
) -> tuple[str, dict[str, str]]:
    choices = [
        (name, columns)
        for name, columns in _known(dataset.format)
        if all(given in value for given in columns.values())
    ]
    if len(choices) == 1:
        name, columns = choices[0]
        return name, dict(columns)
    if choices:
        said = "; ".join(f"{name}: {', '.join(given.values())}" for name, given in choices)
        formats = [name for name, _ in choices]
        line = f"format: {' | '.join(formats)}"
        if len(set(formats)) < len(formats):
            line = " | ".join(f"columns: {_mapping(given)}" for _, given in choices)
        raise UsageError(
            f"its columns make up several formats: {said}",
            where=where,
            hint=f"say which to read in the dataset's settings: {line}",
        )
    name = dataset.format or "prompt_completion"
    example = dict.fromkeys(FORMATS[name][0], "…")
    problem = f"unknown columns: {_names(value)}"
    if dataset.format:
        problem = f"no columns of format {dataset.format}; the row has: {_names(value)}"
    for known, columns in _known(dataset.format):
        if misspelt := _misspelt(columns, list(value)):
            meant = ", ".join(name for name in columns.values() if name not in value)
            raise UsageError(
                f"{problem}, did you mean {meant} (of format {known})?",
                where=where,
                hint=f"rename them, or map them in the dataset's settings: columns: "
                f"{_mapping(misspelt)}",
            )
    if "prompt" in value and not (dataset.format or for_training):
        return "prompt", {"prompt": "prompt"}
    known = "; ".join(
        f"{name}: {', '.join(given.values())}" for name, given in _known(dataset.format)
    )
    alone = "" if for_training else ", or those of prompts alone: columns: {prompt: …}"
    raise UsageError(
        f"{problem}; known: {known}",
        where=where,
        hint=f"map them in the dataset's settings: columns: {_mapping(example)}{alone}; "
        "`post-training data kinds` has the settings of public datasets",
    )


def _known(name: str | None) -> list[tuple[str, dict[str, str]]]:
    """name: of the format that the settings name."""
    if name is None:
        return [choice for choice in KNOWN if choice[0] != "prompt"]
    return [choice for choice in KNOWN if choice[0] == name]


def _misspelt(columns: dict[str, str], there: list[str]) -> dict[str, str]:
    """{its column: the file's} where the row has something near each name; else nothing."""
    found = {}
    for column, name in columns.items():
        near = [name] if name in there else get_close_matches(name, there, 1, 0.75)
        if not near:
            return {}
        found[column] = near[0]
    return found


def _message_list(values: list[Any]) -> list[dict[str, Any]]:
    """The first list of objects among the columns."""
    for value in values:
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return [item for item in value if isinstance(item, dict)]
    return []


def _message_names(
    messages: list[dict[str, Any]], dataset: DatasetConfig, where: str
) -> MessageNames:
    fields = dataset.message_fields
    choices = dict.fromkeys(
        (fields.role or role, fields.content or content) for role, content in _MESSAGE_FIELDS
    )
    fitting = [
        names
        for names in choices
        if any(all(name in message for name in names) for message in messages)
    ]
    if messages and len(fitting) != 1:
        what = "several names for the" if fitting else "unknown"
        raise UsageError(
            f"{what} fields of a message: {_names(messages[0])}; known: role, content; from, value",
            where=where,
            hint="name them in the dataset's settings: message_fields: {role: …, content: …}",
        )
    role, content = next(iter(fitting or choices))
    ignored = frozenset(name.partition("[].")[2] for name in dataset.ignore if "[]." in name)
    roles = dict(dataset.roles)
    return MessageNames(role, content, fields.weight, roles, fields.parts_joined_by, ignored)


def _mapping(columns: dict[str, str]) -> str:
    return f"{{{', '.join(f'{column}: {given}' for column, given in columns.items())}}}"


def _names(value: dict[str, Any]) -> str:
    return ", ".join(value) or "none"


def _conversation(
    prompt: list[Entry],
    entries: list[Entry],
    tools: Tools,
    train_on: Literal["all_turns", "last_turn"],
    train_on_thoughts: bool,
) -> Conversation:
    checked = check_turns(prompt + entries)
    prompt, entries = checked[: len(prompt)], checked[len(prompt) :]
    answers = mark_answers(entries, train_on)
    if not any(message.kind == COMPLETION for message in answers):
        column = entries[-1].key.partition("[")[0] if entries else "messages"
        raise BadRow("untrained", f"{column}: no assistant message to train on")
    return Conversation(
        exclude_thoughts(mark_as_context(prompt) + answers, train_on_thoughts), tools
    )
