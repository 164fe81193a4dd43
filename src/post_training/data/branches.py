"""The rows of the annotation stages: a prompt and its branches, SwissAI's branch format.

    a row of any format with prompts -> branch_row -> one JSON object, written by `row_line`
    {"conversation_id", "initial_prompt", "conversation_branches": [{"messages", …}], …}

Rows that have the format keep all they hold, in its order. Of others, a prompt of several turns has
all but its last message in earlier_messages, and each answer becomes a branch that is not for
reference; the columns that aren't the prompt are kept as original_metadata, where
a reward finds what it checks against. A stage adds its figures to a branch's own object.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from post_training.core.hashing import sha256_value
from post_training.data.formats.columns import (
    Format,
    read_instruction,
    read_side,
    read_system,
    read_tools_column,
)
from post_training.data.formats.messages import (
    Entry,
    MessageNames,
    as_context,
    check_turns,
    marked,
    read_messages,
)
from post_training.data.formats.preference import read_preference
from post_training.data.formats.swissai import EARLIER, read_branch, read_opening
from post_training.data.formats.tools import Tools
from post_training.data.formats.values import filled_text, list_of, required
from post_training.data.rows import BadRow, Conversation, Message
from post_training.data.sources.strict_json import json_line

ID, PROMPT, BRANCHES = "conversation_id", "initial_prompt", "conversation_branches"
# Of a preference row, which has these in place of branches (preference_rows.py).
SIDES = ("chosen", "rejected")
_BEGINNING = f'{{"{ID}": "'.encode()  # as branch_row has it
# Columns that hold a prompt and nothing else; what else a row has goes into original_metadata.
_OF_THE_PROMPT = ("messages", "prompt", "instruction", "input", "system", "tools")


def branch_row(value: dict[str, Any], found: Format, source: str) -> dict[str, Any]:
    """value: a row of format `found`. source: what dataset_source says where the row doesn't.

    conversation_id is the row's, or the sha256 of its prompt. Errors: BadRow.
    """
    if found.name == "swissai":
        row = {ID: None, "dataset_source": source, **_with_own_names(value, found)}
        prompt = check_branch_row(row)
    else:
        prompt, answers = _prompt_and_answers(value, found)
        row = _row(prompt, answers)
        row = {ID: value.get(ID), "dataset_source": source, **row}
        used = {found.columns.get(name) for name in _OF_THE_PROMPT} | {ID}
        row["original_metadata"] = {k: v for k, v in value.items() if k not in used}
    if row[ID] is None:
        row[ID] = sha256_value([[_said(message) for message in prompt.messages], prompt.tools])
    filled_text(row[ID], ID)
    return row


def check_branch_row(row: dict[str, Any]) -> Conversation:
    """The prompt of a row whose branches can all be read. Errors: BadRow."""
    conversations_of(row)
    return prompt_of(row)


def prompt_of(row: dict[str, Any]) -> Conversation:
    """All that stands before the branches, as context. Errors: BadRow."""
    opening, tools = read_opening(row, PROMPT, MessageNames())
    return Conversation(as_context(opening), tools)


def conversations_of(row: dict[str, Any]) -> list[Conversation]:
    """The prompt with each of its branches, those for reference too; what the assistant says in a
    branch is COMPLETION. Errors: BadRow."""
    opening, tools = read_opening(row, PROMPT, MessageNames())
    conversations = []
    for index, item in enumerate(list_of(required(row, BRANCHES), BRANCHES)):
        entries, own_tools = read_branch(item, f"{BRANCHES}[{index}]", tools, MessageNames())
        check_turns(opening + entries)
        answer = marked(entries, "all_turns")
        conversations.append(Conversation(as_context(opening) + answer, own_tools))
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
    declared: Tools = ()
    answers: list[list[Entry]] = []
    match found.name:
        case "messages":
            column = found.columns["messages"]
            entries, declared = read_messages(required(value, column), column, found.messages)
            users = [i for i, entry in enumerate(entries) if entry.messages[0].role == "user"]
            length = users[0] + 1 if users else len(entries)
            prompt, answers = entries[:length], [entries[length:]]
        case "prompt_completion":
            prompt, declared = read_side(value, found, "prompt", "user")
            answers = [read_side(value, found, "completion", "assistant")[0]]
        case "prompt":
            prompt, declared = read_side(value, found, "prompt", "user")
        case "alpaca":
            prompt = read_instruction(value, found)
            answers = [read_side(value, found, "output", "assistant")[0]]
        case "preference":
            pair = read_preference(value, found, train_on_thoughts=True)
            prompt = [Entry("prompt", (message,)) for message in pair.prompt]
            sides = zip(SIDES, (pair.chosen, pair.rejected), strict=True)
            answers = [[Entry(name, messages)] for name, messages in sides]
            declared = pair.tools
        case _:
            raise BadRow("columns", f"rows of format {found.name} have no prompt")
    if found.name != "preference":  # which has its system message already
        prompt = read_system(value, found, prompt) + prompt
        declared = read_tools_column(value, found, declared)
    for answer in answers or [[]]:
        check_turns(prompt + answer)
    conversation = Conversation(as_context(prompt), declared)
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
    row["available_functions"] = [json.loads(tool) for tool in prompt.tools]
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
        return [{"type": "function-output", "content": message.content, "metadata": {}}]
    parts: list[dict[str, Any]] = []
    if message.thought:
        parts.append({"type": "thought", "content": message.thought, "metadata": {}})
    if message.content or not (message.thought or message.tool_calls):
        parts.append({"type": "response", "content": message.content, "metadata": {}})
    parts += [
        {"type": "function-call", "name": call.name, "args": call.arguments, "metadata": {}}
        for call in message.tool_calls
    ]
    return parts
