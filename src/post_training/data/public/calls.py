"""Public datasets in which a model calls tools, often in its own writing: to tools and tool_calls.

Each function takes a row's JSON object and returns the rows it becomes; columns that it does not
name stay as they are. Tools and arguments are kept as JSON text, where a null is meant.
Errors: BadRow.
"""

import ast
import json
import re
from typing import Any

from post_training.data.formats.values import (
    filled_text,
    from_json,
    json_text,
    list_of,
    object_of,
    required,
    text,
    without,
    wrong_type,
)
from post_training.data.public.python_types import parse_type
from post_training.data.rows import SIDES, BadRow
from post_training.data.sources.json_rows import parse_value

Object = dict[str, Any]

_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
# How Hermes' own instruction begins. A template declares tools in its own words, so it is left out.
_HERMES = "You are a function calling AI model"
# The other of its instructions, which also says what the model is for: that stays.
_HERMES_EXTRACTION = "You are an expert structured information extraction AI model"
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}
_ROLES |= {"assistant": "assistant", "tool": "tool"}

_GLAIVE_TOOLS = " with access to the following functions. Use them if required -"
_GLAIVE_SPEAKERS = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_SPEAKER = re.compile(rf"(?:\A|\n\n)\s*({'|'.join(_GLAIVE_SPEAKERS)}):")
_GLAIVE_CALL = "<functioncall>"
# Glaive puts the arguments, which are JSON, into single quotes.
_GLAIVE_ARGUMENTS = re.compile(
    r"\{\s*\"name\":\s*\"([^\"]*)\",\s*\"arguments\":\s*'(.*)'\s*\}", re.DOTALL
)


def hermes(row: Object) -> list[Object]:
    """conversations with <tools>, <tool_call> and <tool_response> in their texts."""
    messages: list[Object] = []
    tools = row.get("tools") or None
    for index, item in enumerate(list_of(required(row, "conversations"), "conversations")):
        key = f"conversations[{index}]"
        turn = object_of(item, key)
        role = _ROLES.get(text(required(turn, "from", key), f"{key}.from"))
        if role is None:
            known = ", ".join(_ROLES)
            raise BadRow("roles", f"{key}.from: must be one of {known} (got {turn['from']!r})")
        said = text(required(turn, "value", key), f"{key}.value")
        # Hermes' instruction also speaks of `<tools> </tools>`, with nothing between.
        declared = [each for each in _TOOLS.findall(said) if each.strip()]
        if role == "system" and declared:
            if not said.lstrip().startswith((_HERMES, _HERMES_EXTRACTION)):
                raise BadRow(
                    "columns",
                    f"{key}.value: declares tools in other words than Hermes' ({_HERMES} …)",
                    "a template writes its own: move them to a column tools by a transform; or "
                    "train it all as text: roles: {tool: user}, without this transform",
                )
            if len(declared) > 1:
                raise BadRow("columns", f"{key}.value: declares tools {len(declared)} times")
            tools = tools or _listed(declared[0], f"{key}.value: <tools>")
            if not said.lstrip().startswith(_HERMES):
                # Its sentences up to the one that first speaks of the tools.
                purpose = said.partition("<tools>")[0].rpartition(". ")[0].strip()
                messages.append({"role": role, "content": f"{purpose}."})
        else:
            messages += _messages(role, said, without(turn, "from", "value"), f"{key}.value")
    others = without(row, "conversations", "tools")
    return [{**others, "messages": messages, **({"tools": tools} if tools else {})}]


def smoltalk2(row: Object) -> list[Object]:
    """messages, or chosen and rejected, with <think> and <tool_call> in their texts, and
    chat_template_kwargs: custom_instructions become the system message, xml_tools the tools."""
    settings = object_of(row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    names = SIDES if "messages" not in row and any(side in row for side in SIDES) else ["messages"]
    others = without(row, *names, "chat_template_kwargs")
    conversations = {name: _smoltalk2_messages(required(row, name), name) for name in names}
    for name, value in settings.items():
        key = f"chat_template_kwargs.{name}"
        if value in (None, "", []):
            continue
        if name == "custom_instructions":
            for messages in conversations.values():
                if messages and messages[0]["role"] == "system":
                    raise BadRow("roles", f"{key}: the messages have a system message of their own")
                messages.insert(0, {"role": "system", "content": text(value, key)})
        elif name == "xml_tools":
            tools = [from_json(text(each, key), key) for each in list_of(value, key)]
            others["tools"] = json_text(tools, key)
        elif name == "enable_thinking":  # Of the prompt's header alone; the thoughts say the rest.
            others["enable_thinking"] = value
        else:
            raise BadRow(
                "columns",
                f"{key}: is not read",
                "calls in Python code have no form here: leave such rows out, by on_error: skip",
            )
    return [{**others, **conversations}]


def _smoltalk2_messages(value: Any, name: str) -> list[Object]:
    messages: list[Object] = []
    for index, item in enumerate(list_of(value, name)):
        key = f"{name}[{index}]"
        message = object_of(item, key)
        role = text(required(message, "role", key), f"{key}.role")
        said = text(required(message, "content", key), f"{key}.content")
        beside = without(message, "role", "content")
        messages += _messages(role, said, beside, f"{key}.content")
    return messages


def xlam(row: Object) -> list[Object]:
    """query, tools and answers (calls) as JSON text, to a user's message and the calls."""
    calls = list_of(_json(required(row, "answers"), "answers"), "answers")
    listed = list_of(_json(required(row, "tools"), "tools"), "tools")
    tools = [_xlam_tool(tool, f"tools[{index}]") for index, tool in enumerate(listed)]
    messages = [
        {"role": "user", "content": filled_text(required(row, "query"), "query")},
        _calling("", [_call(call, f"answers[{index}]") for index, call in enumerate(calls)]),
    ]
    others = without(row, "query", "answers")
    return [{**others, "messages": messages, "tools": json_text(tools, "tools")}]


def glaive(row: Object) -> list[Object]:
    """system, with functions in its text, and chat: `USER: …`, `ASSISTANT: <functioncall> …`,
    `FUNCTION RESPONSE: …`."""
    system = text(required(row, "system"), "system").strip().removeprefix("SYSTEM:").strip()
    others = without(row, "system", "chat")
    opening, functions, declared = system.partition(_GLAIVE_TOOLS)
    if functions:
        system = f"{opening}."
        others["tools"] = _listed(declared, "system")
    messages: list[Object] = [{"role": "system", "content": system}] if system else []
    before, *parts = _GLAIVE_SPEAKER.split(filled_text(required(row, "chat"), "chat"))
    if before.strip() or not parts:
        known = ", ".join(_GLAIVE_SPEAKERS)
        raise BadRow("columns", f"chat: must begin with one of {known} and a colon")
    for number, (speaker, said) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        said = said.strip().removesuffix("<|endoftext|>").strip()
        spoken, calls, call = said.partition(_GLAIVE_CALL)
        role = _GLAIVE_SPEAKERS[speaker]
        if role == "assistant" and calls:
            messages.append(_calling(spoken.strip(), [_glaive_call(call, f"chat, turn {number}")]))
        else:
            messages.append({"role": role, "content": said})
    return [{**others, "messages": messages}]


def _messages(role: str, said: str, beside: Object, key: str) -> list[Object]:
    """The messages of a text in which calls and thoughts stand between tags. beside: the other
    fields of the message."""
    if role == "tool" and "<tool_response>" in said:
        if _RESPONSE.sub("", said).strip():
            raise BadRow("tool-call", f"{key}: text outside <tool_response>")
        outputs = [output.strip() for output in _RESPONSE.findall(said)]
        return [{**beside, "role": role, "content": output} for output in outputs]
    if role != "assistant":
        return [{**beside, "role": role, "content": said}]
    if thought := _THOUGHT.match(said):
        said = said[thought.end() :]
        if thought[1].strip():
            beside = {**beside, "reasoning_content": thought[1].strip()}
    calls = [_call(_json(each, key), key) for each in _CALL.findall(said)]
    if not calls:
        return [{**beside, "role": role, "content": said}]
    spoken, *after = _CALL.split(said)[::2]
    if "".join(after).strip():
        raise BadRow("tool-call", f"{key}: text after a <tool_call>")
    return [{**beside, **_calling(spoken.strip(), calls)}]


def _calling(content: str, calls: list[Object]) -> Object:
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _call(value: Any, key: str) -> Object:
    call = object_of(value, key)
    name = filled_text(required(call, "name", key), f"{key}.name")
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        arguments = json_text({} if arguments is None else arguments, f"{key}.arguments")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _glaive_call(written: str, key: str) -> Object:
    quoted = _GLAIVE_ARGUMENTS.fullmatch(written.strip())
    if quoted is None:
        return _call(_json(written, key), key)
    return _call({"name": quoted[1], "arguments": quoted[2].replace("\\'", "'")}, key)


def _json(written: Any, key: str) -> Any:
    """A value from its JSON text or, as models write it too, from a literal of Python."""
    if not isinstance(written, str):
        return written
    written = written.strip()
    try:
        return parse_value(written)
    except ValueError as fault:
        problem = str(fault)
    try:
        tree = ast.parse(written, mode="eval")
        value = ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise BadRow("tool-call", f"{key}: {problem}") from None
    for node in ast.walk(tree):
        names = [ast.dump(name) for name in node.keys if name] if isinstance(node, ast.Dict) else []
        if len(set(names)) < len(names):
            raise BadRow("tool-call", f"{key}: {problem}")
    return value


def _listed(written: str, key: str) -> str:
    """JSON text of a list of tools, from that or from one object after another."""
    written = written.strip()
    if not written.startswith("{"):
        return json_text(list_of(_json(written, key), key), key)
    tools, start = [], 0
    while start < len(written):
        try:
            _, end = json.JSONDecoder().raw_decode(written, start)
            tools.append(parse_value(written[start:end]))
        except ValueError as fault:
            raise BadRow("tool-call", f"{key}: {str(fault).lower()}") from None
        start = end + len(written[end:]) - len(written[end:].lstrip(" \t\r\n,"))
    return json_text(tools, key)


def _xlam_tool(value: Any, key: str) -> Object:
    """The parameters as a JSON Schema, which they may be already. One is needed unless its type
    says optional, or it has a default, or it says so itself (`required`)."""
    tool = object_of(value, key)
    parameters = object_of(tool.get("parameters") or {}, f"{key}.parameters")
    if parameters.get("type") == "object" and isinstance(parameters.get("properties"), dict):
        return tool
    properties: Object = {}
    needed = []
    for name, given in parameters.items():
        place = f"{key}.parameters.{name}"
        own = object_of(given, place)
        parsed = parse_type(text(required(own, "type", place), f"{place}.type"))
        if parsed is None:
            raise BadRow("tool-call", f"{place}.type: {own['type']!r} has no type in JSON")
        schema, is_optional = parsed
        is_needed = own.get("required", not is_optional and "default" not in own)
        if not isinstance(is_needed, bool):
            raise wrong_type(f"{place}.required", "true or false", is_needed)
        if is_needed:
            needed.append(name)
        properties[name] = {**without(own, "type", "required"), **schema}
    schema = {"type": "object", "properties": properties, "required": needed}
    return {**tool, "parameters": schema}
