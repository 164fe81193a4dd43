"""SwissAI's branch format: one prompt, and the conversations that go on from it.

    system_prompt, initial_prompt, available_functions, conversation_branches[].messages[].parts[]

and, ours, earlier_messages[].parts[]: the turns before the prompt, as context.

Each branch is a conversation of its own, but for those that a model generated for reference
(is_reference_completion), which are never trained on. A message has parts of type response,
thought, function-call, function-output or verifiable-responses, or, in older data, a `content`.
"""

from typing import Any

from post_training.data.formats.messages import Entry, MessageNames, read_role
from post_training.data.formats.parts import Step, assemble, require_one_text
from post_training.data.formats.tools import Tools, arguments_text, read_tools, wrap_function
from post_training.data.formats.values import (
    filled_text,
    json_text,
    list_of,
    object_of,
    required,
    text,
)
from post_training.data.rows import BadRow, Message, ToolCall

# Answers that can be checked are given by a call, as SwissAI's own data preparation has it.
_ANSWERS = {
    "name": "display_answers",
    "description": "Display the answers to the user",
    "parameters": {
        "type": "object",
        "properties": {
            "answers": {
                "type": "array",
                "items": {"type": "string"},
                "description": "The answers to the user",
            }
        },
        "required": ["answers"],
    },
}
EARLIER = "earlier_messages"
_ANSWERS_OUTPUT = '"Answers displayed"'


def read_branches(
    row: dict[str, Any], columns: dict[str, str], names: MessageNames
) -> list[tuple[list[Entry], list[Entry], Tools]]:
    """(what stands before, entries, tools) of each branch that is not for reference.

    Errors: BadRow.
    """
    opening, tools = read_opening(row, columns["initial_prompt"], names)
    column = columns["conversation_branches"]
    branches = []
    for index, item in enumerate(list_of(required(row, column), column)):
        key = f"{column}[{index}]"
        if not is_reference(item, key):
            entries, own_tools = read_branch(item, key, tools, names)
            branches.append((opening, entries, own_tools))
    if not branches:
        raise BadRow("untrained", f"{column}: no branch that is not for reference")
    return branches


def is_reference(branch: Any, key: str) -> bool:
    """Whether a model generated it for reference. Older data says it in the metadata of the last
    message's first part. Errors: BadRow."""
    branch = object_of(branch, key)
    if branch.get("is_reference_completion") is not None:
        return bool(branch["is_reference_completion"])
    messages = _branch_messages(branch, key)
    parts = (messages[-1].get("parts") if messages else None) or [{}]
    metadata = parts[0].get("metadata") if isinstance(parts[0], dict) else None
    return isinstance(metadata, dict) and bool(metadata.get("is_reference_completion"))


def read_branch(
    branch: Any, key: str, tools: Tools, names: MessageNames
) -> tuple[list[Entry], Tools]:
    """The entries after the prompt; the prompt's tools, and that of answers which can be checked.

    A model may have said nothing: the response of a branch for reference may be empty.
    Errors: BadRow.
    """
    may_be_empty = is_reference(branch, key)
    entries = [
        _entry(message, f"{key}.messages[{number}]", names, tools, may_be_empty=may_be_empty)
        for number, message in enumerate(_branch_messages(branch, key))
    ]
    calls = [call for entry in entries for each in entry.messages for call in each.tool_calls]
    if any(call.name == _ANSWERS["name"] for call in calls):
        tools = (*tools, json_text(wrap_function(_ANSWERS), key))
    return entries, tools


def _branch_messages(branch: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return _messages(branch.get("messages"), f"{key}.messages")


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    return [
        object_of(message, f"{key}[{number}]") for number, message in enumerate(list_of(value, key))
    ]


def read_opening(
    row: dict[str, Any], column: str, names: MessageNames
) -> tuple[list[Entry], Tools]:
    """What stands before the branches: a system message and earlier turns, if any, and the prompt.

    Errors: BadRow.
    """
    opening = []
    if row.get("system_prompt") is not None:
        system = row["system_prompt"]
        content = system.get("content") if isinstance(system, dict) else system
        if content is not None and text(content, "system_prompt").strip():
            opening.append(Entry("system_prompt", (Message("system", content),)))
    tools = read_tools(row.get("available_functions"), "available_functions")
    opening += [
        _entry(message, f"{EARLIER}[{number}]", names, tools)
        for number, message in enumerate(_messages(row.get(EARLIER) or [], EARLIER))
    ]
    prompt = object_of(required(row, column), column)
    return [*opening, _entry({"role": "user", **prompt}, column, names, tools)], tools


def _entry(
    message: dict[str, Any],
    key: str,
    names: MessageNames,
    tools: Tools,
    *,
    may_be_empty: bool = False,
) -> Entry:
    role = read_role(required(message, "role", key), f"{key}.role", names)
    if message.get("parts") is None:
        content = filled_text(required(message, "content", key), f"{key}.content")
        return Entry(key, (Message(role, content),))
    key = f"{key}.parts"
    parts = [
        object_of(part, f"{key}[{index}]")
        for index, part in enumerate(list_of(message["parts"], key))
    ]
    if role == "assistant" and may_be_empty and _is_empty_response(parts):
        return Entry(key, (Message("assistant", parts[0]["content"]),))
    steps: list[Step] = []
    for index, part in enumerate(parts):
        steps += _steps(part, f"{key}[{index}]", tools)
    if role == "assistant":
        return Entry(key, assemble(steps, key))
    texts = [value for kind, value in steps if kind == "response" and isinstance(value, str)]
    if len(texts) < len(steps):
        raise BadRow("roles", f"{key}: only an assistant thinks and calls (role {role})")
    return Entry(key, (Message(role, require_one_text(texts, key)),))


def _is_empty_response(parts: list[dict[str, Any]]) -> bool:
    if len(parts) != 1 or parts[0].get("type") != "response":
        return False
    content = parts[0].get("content")
    return isinstance(content, str) and not content.strip()


def _steps(part: dict[str, Any], key: str, tools: Tools) -> list[Step]:
    match part.get("type"):
        case "response":
            return [("response", filled_text(part.get("content"), f"{key}.content"))]
        case "thought":
            return [("thought", filled_text(part.get("content"), f"{key}.content"))]
        case "function-call":
            name = filled_text(part.get("name"), f"{key}.name")
            arguments = arguments_text(part.get("args"), f"{key}.args", name, tools)
            return [("call", ToolCall(name, arguments, part.get("id") or None))]
        case "function-output":  # null, where the function gave nothing
            output = text(part.get("content") or "", f"{key}.content")
            call_id, name = part.get("tool_call_id") or None, part.get("name") or None
            return [("output", Message("tool", output, tool_call_id=call_id, name=name))]
        case "verifiable-responses":
            answers = list_of(part.get("answers"), f"{key}.answers")
            call = ToolCall("display_answers", json_text({"answers": answers}, f"{key}.answers"))
            return [("call", call), ("output", Message("tool", _ANSWERS_OUTPUT))]
    known = "response, thought, function-call, function-output, verifiable-responses"
    raise BadRow("columns", f"{key}.type: must be one of {known} (got {part.get('type')!r})")
