"""A list of messages as it stands in a row, read into rows.Message and checked.

    [{"role": "user", "content": "…"}, …] -> entries -> check_turns -> Messages with their kind

An entry is what one item of the list becomes: one message, or the parts of an assistant's turn. A
message that says itself whether it is trained (its weight) has its kind when it is read; the
others are PROMPT until `marked`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from post_training.data.formats import blocks
from post_training.data.formats.tools import Tools, read_calls
from post_training.data.formats.values import (
    filled_text,
    is_number,
    list_of,
    object_of,
    required,
    text,
    wrong_type,
)
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT, BadRow, Message, Role

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
THOUGHTS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class MessageNames:
    """What a message's fields are called, and the roles that the settings name. weight: None
    for the default, where a boolean is no weight."""

    role: str = "role"
    content: str = "content"
    weight: str | None = None
    roles: dict[str, Role] = field(default_factory=dict)


class Entry(NamedTuple):
    """key: where it stands in the row."""

    key: str
    messages: tuple[Message, ...]


def read_messages(value: Any, key: str, names: MessageNames) -> tuple[list[Entry], Tools]:
    """The entries, and the tools that a developer message declares."""
    items = list_of(value, key)
    if not items:
        raise BadRow("empty", f"{key}: is empty")
    entries, tools = [], ()
    roles = ROLES | names.roles
    for index, item in enumerate(items):
        place = f"{key}[{index}]"
        if message := _ordinary_message(item, names, roles):
            entries.append(Entry(place, (message,)))
            continue
        item = object_of(item, place)
        role = read_role(required(item, names.role, place), f"{place}.{names.role}", names)
        content = item.get(names.content)
        if isinstance(content, dict):
            content_key = f"{place}.{names.content}"
            if role == "developer":
                tools = blocks.declared_tools(content, content_key)
                continue
            messages = blocks.read_blocks(role, content, content_key)
        else:
            messages = (_message(item, role, place, names),)
        # An empty system message says no more than none.
        if role not in ("system", "developer") or messages[0].content.strip():
            entries.append(Entry(place, _weighed(messages, item, place, names)))
    return entries, tools


def read_role(value: Any, key: str, names: MessageNames) -> Role:
    given = text(value, key)
    role = names.roles.get(given) or ROLES.get(given.lower())
    if role is None:
        known = ", ".join(dict.fromkeys((*names.roles, *ROLES)))
        raise BadRow("roles", f"{key}: must be one of {known} (got {given!r})")
    return role


def check_turns(entries: list[Entry]) -> None:
    """System, developer; then user and assistant by turns, the user first. Tools answer the
    calls of the assistant before them. Errors: BadRow."""
    previous: Role | None = None
    heads: list[Role] = []
    num_open_calls = 0
    for key, messages in entries:
        role = messages[0].role
        if role in ("system", "developer"):
            if role in heads or previous not in (None, "system", "developer"):
                raise BadRow("roles", f"{key}: a {role} message stands first, and once")
            heads.append(role)
        elif role == "user" and previous == "user":
            raise BadRow("roles", f"{key}: user follows user")
        elif role == "assistant" and previous not in ("user", "tool"):
            raise BadRow("roles", f"{key}: assistant follows {previous or 'nothing'}")
        if role == "user":
            num_open_calls = 0
        for message in messages:
            if message.role == "tool":
                if num_open_calls == 0:
                    raise BadRow("tool-call", f"{key}: a tool's output without a call before it")
                num_open_calls -= 1
            if message.tool_calls:
                num_open_calls = len(message.tool_calls)
        previous = messages[-1].role


def marked(
    entries: list[Entry], train_on: Literal["all_turns", "last_turn"]
) -> tuple[Message, ...]:
    """With the kind of each assistant's message: as its row says, else as `train_on`."""
    messages = [message for entry in entries for message in entry.messages]
    start = 0
    if train_on == "last_turn" and all(message.kind == PROMPT for message in messages):
        start = _start_of_last_turn(messages)
    for index, message in enumerate(messages[start:], start):
        if message.role == "assistant" and message.kind == PROMPT:
            # What dataclasses.replace does takes three times as long.
            messages[index] = Message(
                message.role,
                message.content,
                COMPLETION,
                message.weight,
                message.thought,
                message.tool_calls,
            )
    return tuple(messages)


def as_context(entries: list[Entry]) -> tuple[Message, ...]:
    """Of a prompt nothing is trained, whatever its messages say."""
    return tuple(
        replace(message, kind=PROMPT, weight=1.0) if message.kind == COMPLETION else message
        for entry in entries
        for message in entry.messages
    )


def with_thoughts(messages: tuple[Message, ...], train_on_thoughts: bool) -> tuple[Message, ...]:
    """Where thoughts are not trained, a message with one becomes two, and it is EXCLUDED."""
    if train_on_thoughts:
        return messages
    return tuple(
        part
        for message in messages
        for part in (
            (
                Message(message.role, "", EXCLUDED, thought=message.thought),
                replace(message, thought=None),
            )
            if message.thought is not None and message.kind != EXCLUDED
            else (message,)
        )
    )


def _ordinary_message(item: Any, names: MessageNames, roles: dict[str, Role]) -> Message | None:
    """Of an item that is a known role and a text with something in it, and no more: most are, and
    there is nothing else to look for. None: for read_messages to read, or to say what is wrong."""
    if not isinstance(item, dict) or len(item) != 2:
        return None
    role, content = item.get(names.role), item.get(names.content)
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        return None
    return Message(roles[role], content) if role in roles else None


def _message(item: dict[str, Any], role: Role, key: str, names: MessageNames) -> Message:
    calls = read_calls(item, key)
    if calls and role != "assistant":
        raise BadRow("tool-call", f"{key}: only an assistant calls tools (role {role})")
    if calls and item.get(names.content) is None:  # as OpenAI writes a call
        content = ""
    else:
        content = text(required(item, names.content, key), f"{key}.{names.content}")
        if role == "user" or (role == "assistant" and not calls):
            filled_text(content, f"{key}.{names.content}")
    if role != "assistant":
        return Message(role, content)
    return Message(role, content, thought=_thought(item, key), tool_calls=calls)


def _thought(item: dict[str, Any], key: str) -> str | None:
    for name in THOUGHTS:
        if item.get(name) not in (None, ""):
            return text(item[name], f"{key}.{name}")
    return None


def _weighed(
    messages: tuple[Message, ...], item: dict[str, Any], key: str, names: MessageNames
) -> tuple[Message, ...]:
    value = item.get(names.weight or "weight")
    if value is None:
        return messages
    key = f"{key}.{names.weight or 'weight'}"
    if isinstance(value, bool) and names.weight is not None:
        value = float(value)
    if not is_number(value):
        raise wrong_type(key, "a finite number", value)
    if value < 0:
        raise BadRow("columns", f"{key}: must be >= 0 (got {value})")
    kind = COMPLETION if value else EXCLUDED
    return tuple(
        replace(message, kind=kind, weight=float(value)) if message.role == "assistant" else message
        for message in messages
    )


def _start_of_last_turn(messages: list[Message]) -> int:
    end = len(messages)
    while end and messages[end - 1].role == "user":
        end -= 1
    while end and messages[end - 1].role in ("assistant", "tool"):
        end -= 1
    return end
