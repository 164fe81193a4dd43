"""A list of messages as it stands in a row, read into rows.Message and checked.

    [{"role": "user", "content": "…"}, …] -> entries -> check_turns -> Messages with their kind

An entry is what one item of the list becomes: one message, or the parts of an assistant's turn. A
message that says itself whether it is trained (its weight) has its kind when it is read; the
others are PROMPT until `mark_answers`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from post_training.data.formats.parts import declared_tools, read_blocks, text_of_parts
from post_training.data.formats.tools import Tools, output_text, read_call, read_calls
from post_training.data.formats.unread import CALLS, FLAGS, THOUGHTS, WEIGHTS
from post_training.data.formats.values import (
    filled_text,
    from_json,
    is_number,
    list_of,
    object_of,
    required,
    says_something,
    text,
    wrong_type,
)
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT, BadRow, Message, Role, ToolCall

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
# LLaMA-Factory's role of a turn that is nothing but calls, as JSON.
_CALLING = "function_call"


@dataclass(frozen=True)
class MessageNames:
    """What a message's fields are called.

    weight: None for the usual names (WEIGHTS and FLAGS of unread.py). roles: {the file's: ours},
    those that the settings name. parts_joined_by: what stands between several texts of one content;
    None where they are refused. ignored: fields that are not to be read.
    """

    role: str = "role"
    content: str = "content"
    weight: str | None = None
    roles: dict[str, Role] = field(default_factory=dict)
    parts_joined_by: str | None = None
    ignored: frozenset[str] = field(default=frozenset(), compare=False)

    def reads(self, name: str) -> str | None:
        """What a field is read as."""
        if name in self.ignored:
            return None
        if name == self.weight or (self.weight is None and name in (*WEIGHTS, *FLAGS)):
            return "weight"
        if name in THOUGHTS:
            return "thought"
        if name in CALLS:
            return "calls"
        return name if name in ("tool_call_id", "name") else None


class Entry(NamedTuple):
    """key: where it stands in the row."""

    key: str
    messages: tuple[Message, ...]


def read_messages(
    value: Any, key: str, names: MessageNames, tools: Tools = ()
) -> tuple[list[Entry], Tools]:
    """The entries of a list of messages, and the tools that a developer message declares.

    key: where the list stands in the row. tools: those of the row's own column.
    Errors: BadRow.
    """
    items = list_of(value, key)
    if not items:
        raise BadRow("empty", f"{key}: is empty")
    entries: list[Entry] = []
    declared: Tools = ()
    roles = ROLES | names.roles
    for index, item in enumerate(items):
        place = f"{key}[{index}]"
        if message := _ordinary_message(item, names, roles):
            entries.append(Entry(place, (message,)))
            continue
        item = object_of(item, place)
        if names.ignored:
            item = {name: each for name, each in item.items() if name not in names.ignored}
        given = required(item, names.role, place)
        content, content_key = item.get(names.content), f"{place}.{names.content}"
        if given == _CALLING and _CALLING not in names.roles:
            calls = _calls_as_text(content, content_key, tools or declared)
            messages = (Message("assistant", "", thought=_thought(item, place), tool_calls=calls),)
            entries.append(Entry(place, _weighed(messages, item, place, names)))
            continue
        role = read_role(given, f"{place}.{names.role}", names)
        if role == "tool" and is_structured(content):
            content = output_text(content, content_key)
            item = {**item, names.content: content}
        if isinstance(content, dict):
            if twice := [name for name in (*THOUGHTS, *CALLS) if says_something(item.get(name))]:
                raise BadRow("columns", f"{place}.{twice[0]}: the content has parts of its own")
            if role == "developer":
                declared = declared_tools(content, content_key)
                continue
            messages = read_blocks(role, content, content_key, tools or declared)
        else:
            if isinstance(content, list):
                item = {
                    **item,
                    names.content: text_of_parts(content, content_key, names.parts_joined_by),
                }
            messages = (_message(item, role, place, names, tools or declared),)
        # An empty system message says no more than none, and not every template can write one.
        if role not in ("system", "developer") or messages[0].content.strip():
            entries.append(Entry(place, _weighed(messages, item, place, names)))
    if len(entries) > 1 and entries[1].messages[0].role == "system" and _is_twice(entries[:2]):
        del entries[1]
    return entries, declared


def _is_twice(entries: list[Entry]) -> bool:
    return entries[0].messages == entries[1].messages


def is_structured(content: Any) -> bool:
    """Whether a tool's output is a JSON value of its own: no text, and no list of parts."""
    if isinstance(content, list):
        return not all(isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, dict | int | float)


def read_role(value: Any, key: str, names: MessageNames) -> Role:
    """Our name of a role. Errors: BadRow for one that is not known."""
    given = text(value, key)
    role = names.roles.get(given) or ROLES.get(given.lower())
    if role is None:
        known = ", ".join(dict.fromkeys((*names.roles, *ROLES, _CALLING)))
        raise BadRow("roles", f"{key}: must be one of {known} (got {given!r})")
    return role


def check_turns(entries: list[Entry]) -> list[Entry]:
    """The entries, with the outputs of tools in the order of their calls.

    Allowed are: system, developer; then user and assistant by turns, the user first. Tools answer
    the calls of the assistant before them, by the calls' ids where the outputs have any.
    Errors: BadRow.
    """
    previous: Role | None = None
    heads: list[Role] = []
    num_open_calls = 0
    calls = False
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
                    problem = f"{key}: a tool's output without a call before it"
                    raise BadRow("tool-call", problem, _hint_of_calls_as_text(entries))
                num_open_calls -= 1
            if message.tool_calls:
                num_open_calls = len(message.tool_calls)
                calls = True
        previous = messages[-1].role
    return _in_order_of_calls(entries) if calls else entries


def _hint_of_calls_as_text(entries: list[Entry]) -> str | None:
    """Where the answers hold calls in some model's own writing."""
    for _, messages in entries:
        if messages[0].role == "assistant" and "<tool_call>" in messages[0].content:
            return (
                "the calls are written in the text: read Hermes' writing as calls (in the "
                "dataset's settings: transform: hermes), or train it as it stands, with the "
                "outputs as the user's turns (roles: {tool: user})"
            )
    return None


def _in_order_of_calls(entries: list[Entry]) -> list[Entry]:
    messages = [message for entry in entries for message in entry.messages]
    keys = [entry.key for entry in entries for _ in entry.messages]
    calls: list[str | None] = []
    num_answered = start = 0
    while start < len(messages):
        if messages[start].tool_calls:
            calls, num_answered = [call.id for call in messages[start].tool_calls], 0
        end = start
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        if end > start:
            outputs = messages[start:end]
            messages[start:end] = _ordered(outputs, calls, num_answered, keys[start:end])
            num_answered += end - start
        start = max(end, start + 1)
    rest = iter(messages)
    return [Entry(key, tuple(next(rest) for _ in own)) for key, own in entries]


def _ordered(
    outputs: list[Message], calls: list[str | None], num_answered: int, keys: list[str]
) -> list[Message]:
    """The outputs that follow each other, in the order of the calls' ids. Those without ids stand
    in that order, and get the ids of the calls."""
    if not any(output.tool_call_id for output in outputs):
        ids = calls[num_answered : num_answered + len(outputs)]
        return [replace(output, tool_call_id=own) for output, own in zip(outputs, ids, strict=True)]
    places = []
    for output, key in zip(outputs, keys, strict=True):
        if output.tool_call_id is None:
            raise BadRow("tool-call", f"{key}: has no tool_call_id, and other outputs have one")
        if calls.count(output.tool_call_id) != 1:
            num = "several calls" if output.tool_call_id in calls else "no call"
            problem = f"{key}.tool_call_id: {output.tool_call_id!r} is of {num} before it"
            raise BadRow("tool-call", problem)
        places.append(calls.index(output.tool_call_id))
    if sorted(places) != list(range(num_answered, num_answered + len(places))):
        problem = (
            f"{keys[0]}: outputs of one call stand twice, or one of an earlier call is missing"
        )
        raise BadRow("tool-call", problem)
    return [output for _, output in sorted(zip(places, outputs, strict=True), key=lambda x: x[0])]


def mark_answers(
    entries: list[Entry], train_on: Literal["all_turns", "last_turn"]
) -> tuple[Message, ...]:
    """The messages of the entries, those of the assistant with their kind: as the row says it, else
    as `train_on` does."""
    messages = [message for entry in entries for message in entry.messages]
    start = 0
    if train_on == "last_turn" and all(message.kind == PROMPT for message in messages):
        start = _start_of_last_turn(messages)
    for index, message in enumerate(messages[start:], start):
        if message.role == "assistant" and message.kind == PROMPT:
            # Not by dataclasses.replace, which takes three times as long.
            messages[index] = Message(
                message.role,
                message.content,
                COMPLETION,
                message.weight,
                message.thought,
                message.tool_calls,
            )
    return tuple(messages)


def mark_as_context(entries: list[Entry]) -> tuple[Message, ...]:
    """Of a prompt nothing is trained, whatever its messages say."""
    return tuple(
        replace(message, kind=PROMPT, weight=1.0) if message.kind == COMPLETION else message
        for entry in entries
        for message in entry.messages
    )


def exclude_thoughts(messages: tuple[Message, ...], train_on_thoughts: bool) -> tuple[Message, ...]:
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
    """The message of an item that is a known role and a text with something in it, and no more.

    Most are, and of them there is nothing else to check: this is the fast way. None: read_messages
    has to read it, or to say what is wrong.
    """
    if not isinstance(item, dict) or len(item) != 2:
        return None
    role, content = item.get(names.role), item.get(names.content)
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        return None
    return Message(roles[role], content) if role in roles else None


def _message(
    item: dict[str, Any], role: Role, key: str, names: MessageNames, tools: Tools
) -> Message:
    calls = read_calls(item, key, tools)
    if calls and role != "assistant":
        raise BadRow("tool-call", f"{key}: only an assistant calls tools (role {role})")
    if calls and item.get(names.content) is None:  # as OpenAI writes a call
        content = ""
    else:
        content = text(required(item, names.content, key), f"{key}.{names.content}")
        if role == "user" or (role == "assistant" and not calls):
            filled_text(content, f"{key}.{names.content}")
    thought = _thought(item, key)
    if role == "assistant":
        return Message(role, content, thought=thought, tool_calls=calls)
    if thought is not None:
        raise BadRow("columns", f"{key}: only an assistant thinks (role {role})")
    if role != "tool":
        return Message(role, content)
    call_id, name = item.get("tool_call_id"), item.get("name")
    return Message(
        role,
        content,
        tool_call_id=None if call_id in (None, "") else str(call_id),
        name=text(name, f"{key}.name") if name else None,
    )


def _calls_as_text(content: Any, key: str, tools: Tools) -> tuple[ToolCall, ...]:
    calls = from_json(filled_text(content, key), key)
    if not isinstance(calls, list):
        return (read_call(calls, key, tools),)
    if not calls:
        raise BadRow("empty", f"{key}: is empty")
    return tuple(read_call(call, f"{key}[{index}]", tools) for index, call in enumerate(calls))


def _thought(item: dict[str, Any], key: str) -> str | None:
    filled = [name for name in THOUGHTS if item.get(name) not in (None, "")]
    if not filled:
        return None
    if any(item[name] != item[filled[0]] for name in filled[1:]):
        raise BadRow("columns", f"{key}: {' and '.join(filled)} are different thoughts")
    return text(item[filled[0]], f"{key}.{filled[0]}")


def _weighed(
    messages: tuple[Message, ...], item: dict[str, Any], key: str, names: MessageNames
) -> tuple[Message, ...]:
    weights = {
        name: _weight(item[name], f"{key}.{name}", names)
        for name in ((names.weight,) if names.weight else (*WEIGHTS, *FLAGS))
        if item.get(name) is not None
    }
    if not weights:
        return messages
    weight = next(iter(weights.values()))
    if any(each != weight for each in weights.values()):
        raise BadRow("columns", f"{key}: {' and '.join(weights)} say different weights")
    asked = [name for name in weights if item[name] is True or (name in FLAGS and item[name])]
    if asked and messages[0].role != "assistant":
        problem = f"{key}.{asked[0]}: only an assistant's message is trained"
        raise BadRow("columns", f"{problem} (role {messages[0].role})")
    kind = COMPLETION if weight else EXCLUDED
    return tuple(
        replace(message, kind=kind, weight=weight) if message.role == "assistant" else message
        for message in messages
    )


def _weight(value: Any, key: str, names: MessageNames) -> float:
    """The weight that a field says: a number; a flag, and the field that the settings name, may
    also be true or false."""
    is_flag = key.rpartition(".")[2] in FLAGS and names.weight is None
    if isinstance(value, bool) and (is_flag or names.weight is not None):
        return float(value)
    if is_flag and value not in (0, 1):
        raise wrong_type(key, "true or false", value)
    if not is_number(value):
        raise wrong_type(key, "a finite number", value)
    if value < 0:
        raise BadRow("columns", f"{key}: must be >= 0 (got {value})")
    return float(value)


def _start_of_last_turn(messages: list[Message]) -> int:
    end = len(messages)
    while end and messages[end - 1].role == "user":
        end -= 1
    while end and messages[end - 1].role in ("assistant", "tool"):
        end -= 1
    return end
