"""The rows of the annotation stages: a prompt and its branches, SwissAI's branch format.

    a row of any format with prompts -> branch_row -> one JSON object, written by `row_line`
    {"conversation_id", "initial_prompt", "conversation_branches": [{"messages", …}], …}

Rows that have the format keep all they hold, in its order. Of others, a prompt of several turns has
all but its last message in earlier_messages, and each answer becomes a branch that is not for
reference; the columns that aren't the prompt are kept as original_metadata, where
a reward function finds what it checks against. A stage adds its figures to a branch's own object.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from post_training.core.hashing import sha256_value
from post_training.data.config import FORMATS
from post_training.data.formats.columns import (
    Format,
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
    mark_answers,
    mark_as_context,
    read_messages,
)
from post_training.data.formats.preference import read_preference
from post_training.data.formats.swissai import EARLIER, read_branch, read_opening
from post_training.data.formats.tools import Tools, unwrap_function
from post_training.data.formats.values import filled_text, list_of, required
from post_training.data.rows import SIDES, BadRow, Conversation, Message
from post_training.data.sources.json_rows import json_line

ID, PROMPT, BRANCHES = "conversation_id", "initial_prompt", "conversation_branches"
_BEGINNING = f'{{"{ID}": "'.encode()  # as branch_row has it
# Columns that hold a prompt and nothing else; what else a row has goes into original_metadata.
_OF_THE_PROMPT = ("messages", "prompt", "instruction", "input", "system", "tools")


def branch_row(value: dict[str, Any], found: Format, source: str) -> dict[str, Any]:
    """value: a row of format `found`. source: what dataset_source says where the row doesn't.

    conversation_id is the row's, or the sha256 of its prompt. Errors: BadRow.
    """
    if found.name == "swissai":
        own = _with_own_names(found.visible(value), found)
        row = {ID: None, "dataset_source": source, **own}
        prompt = check_branch_row(row)
    else:
        prompt, answers = _prompt_and_answers(value, found)
        row = _row(prompt, answers)
        row = {ID: value.get(ID), "dataset_source": source, **row}
        used = {ID, *(each for name in _OF_THE_PROMPT for each in found.names(name))}
        row["original_metadata"] = {k: v for k, v in value.items() if k not in used}
    if row[ID] is None:
        tools = [json.dumps(unwrap_function(tool), ensure_ascii=False) for tool in prompt.tools]
        row[ID] = sha256_value([[_said(message) for message in prompt.messages], tools])
    filled_text(row[ID], ID)
    return row


def check_branch_row(row: dict[str, Any]) -> Conversation:
    """The prompt of a row whose branches can all be read. Errors: BadRow."""
    conversations_of(row)
    return prompt_of(row)


def prompt_of(row: dict[str, Any]) -> Conversation:
    """All that stands before the branches, as context. Errors: BadRow."""
    opening, tools = read_opening(row, PROMPT, MessageNames())
    return Conversation(mark_as_context(opening), tools)


def conversations_of(row: dict[str, Any]) -> list[Conversation]:
    """The prompt with each of its branches, those for reference too; what the assistant says in a
    branch is COMPLETION. Errors: BadRow."""
    opening, tools = read_opening(row, PROMPT, MessageNames())
    conversations = []
    for index, item in enumerate(list_of(required(row, BRANCHES), BRANCHES)):
        entries, own_tools = read_branch(item, f"{BRANCHES}[{index}]", tools, MessageNames())
        checked = check_turns(opening + entries)
        before, answer = checked[: len(opening)], mark_answers(checked[len(opening) :], "all_turns")
        conversations.append(Conversation(mark_as_context(before) + answer, own_tools))
    return conversations


def new_branch(text: str, *, is_reference: bool, metadata: dict[str, Any]) -> dict[str, Any]:
    """A branch that is one answer."""
    return {
        "messages": _branch_messages([Message("assistant", text)]),
        "is_reference_completion": is_reference,
        "metadata": metadata,
    }


def is_truncated(branch: dict[str, Any]) -> bool:
    """Whether its model was stopped before it had finished."""
    return branch.get("finish_reason") == "length"


def row_line(row: dict[str, Any]) -> bytes:
    """The row as a line of a JSONL file. Errors: BadRow for what can't be one."""
    return json_line(row)


def row_id(line: bytes) -> str:
    """The conversation_id of a line that `row_line` wrote, most of which need not be parsed."""
    if line.startswith(_BEGINNING):
        text = line[len(_BEGINNING) : line.index(b'"', len(_BEGINNING))]
        if b"\\" not in text:
            return text.decode()
    return json.loads(line)[ID]


def _with_own_names(value: dict[str, Any], found: Format) -> dict[str, Any]:
    theirs = {given: own for own, given in found.columns.items()}
    return {theirs.get(column, column): cell for column, cell in value.items()}


def _prompt_and_answers(
    value: dict[str, Any], found: Format
) -> tuple[Conversation, list[list[Message]]]:
    """The prompt, which ends with a message of the user, and what follows it in each answer. Of
    messages without a prompt of their own it is what ends with the user's first."""
    value = found.visible(value)
    tools = read_tools_column(value, found)
    declared: Tools = ()
    answers: list[list[Entry]] = []
    match found.name:
        case "messages":
            column = found.columns["messages"]
            given = required(value, column)
            entries, declared = read_messages(given, column, found.messages, tools)
            users = [i for i, entry in enumerate(entries) if entry.messages[0].role == "user"]
            length = users[0] + 1 if users else len(entries)
            prompt, answers = entries[:length], [entries[length:]]
        case "prompt_completion" | "alpaca":
            asked, answered = FORMATS[found.name][0]
            prompt, declared = read_prompt(value, found, asked, tools)
            answers = [read_side(value, found, answered, "assistant", tools or declared)[0]]
        case "prompt":
            prompt, declared = read_prompt(value, found, "prompt", tools)
        case "preference":
            pair = read_preference(value, found, train_on_thoughts=True)
            prompt = [Entry("prompt", (message,)) for message in pair.prompt]
            sides = zip(SIDES, (pair.chosen, pair.rejected), strict=True)
            answers = [[Entry(name, messages)] for name, messages in sides]
            tools = pair.tools
        case _:
            raise BadRow("columns", f"rows of format {found.name} have no prompt")
    if found.name != "preference":  # which has its system message and tools already
        prompt = read_system(value, found, prompt) + prompt
        tools = tools_of(tools, declared, found)
    for index, answer in enumerate(answers):
        answers[index] = check_turns(prompt + answer)[len(prompt) :]
    prompt = check_turns(prompt)
    conversation = Conversation(mark_as_context(prompt), tools)
    if not any(message.role == "user" for message in conversation.messages):
        raise BadRow("roles", "no message of a user")
    if conversation.messages[-1].role != "user":
        raise BadRow("roles", f"{prompt[-1].key}: a prompt ends with a message of the user")
    told = [[message for entry in answer for message in entry.messages] for answer in answers]
    return conversation, [messages for messages in told if messages]


def _row(prompt: Conversation, answers: Sequence[list[Message]]) -> dict[str, Any]:
    *before, question = prompt.messages
    heads = [message for message in before if message.role in ("system", "developer")]
    if any(message.role == "developer" for message in heads):
        raise BadRow("roles", "a developer's message has no place in a row of branches")
    row: dict[str, Any] = {}
    if heads:
        row["system_prompt"] = {"content": heads[0].content, "metadata": {}}
    if earlier := before[len(heads) :]:
        row[EARLIER] = _branch_messages(earlier)
    row[PROMPT] = {"role": "user", "content": question.content, "metadata": {}}
    row["available_functions"] = [unwrap_function(tool) for tool in prompt.tools]
    row[BRANCHES] = [
        {
            "messages": _branch_messages(answer),
            "is_reference_completion": False,
            "metadata": {},
        }
        for answer in answers
    ]
    return row


def _said(message: Message) -> list[Any]:
    """What tells two prompts apart."""
    more = [message.thought, [[call.name, call.arguments] for call in message.tool_calls]]
    return [message.role, message.content, *(more if any(more) else [])]


def _branch_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """An assistant's messages and its tools' between two of the user are one, in parts."""
    return [
        {
            "role": "user" if of_user else "assistant",
            "parts": [part for message in group for part in _parts(message)],
        }
        for of_user, group in groupby(messages, key=lambda message: message.role == "user")
    ]


def _parts(message: Message) -> list[dict[str, Any]]:
    if message.role == "tool":
        names = {"tool_call_id": message.tool_call_id, "name": message.name}
        given = {name: value for name, value in names.items() if value is not None}
        part = {"type": "function-output", "content": message.content, "metadata": {}}
        return [{**part, **given}]
    parts: list[dict[str, Any]] = []
    if message.thought:
        parts.append({"type": "thought", "content": message.thought, "metadata": {}})
    if message.content or not (message.thought or message.tool_calls):
        parts.append({"type": "response", "content": message.content, "metadata": {}})
    for call in message.tool_calls:
        part = {"type": "function-call", "name": call.name, "args": call.arguments, "metadata": {}}
        parts.append(part if call.id is None else {**part, "id": call.id})
    return parts
