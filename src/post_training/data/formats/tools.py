"""Functions that a model may call, and its calls of them."""

from typing import Any

from post_training.data.formats.values import (
    filled_text,
    from_json,
    json_text,
    list_of,
    object_of,
)
from post_training.data.rows import BadRow, ToolCall

# JSON text of each function.
Tools = tuple[str, ...]


def read_tools(value: Any, key: str) -> Tools:
    """JSON text of each function {name, description, parameters}, of a list or its JSON text.

    The wrapping {"type": "function", "function": …} is taken off.
    """
    if isinstance(value, str):
        value = from_json(value, key) if value.strip() else None
    if value is None:
        return ()
    return tuple(
        json_text(_function(item, f"{key}[{index}]"))
        for index, item in enumerate(list_of(value, key))
    )


def read_calls(message: dict[str, Any], key: str) -> tuple[ToolCall, ...]:
    """Of OpenAI's `tool_calls`, or the older `function_call`."""
    if message.get("function_call"):
        return (read_call(message["function_call"], f"{key}.function_call"),)
    key = f"{key}.tool_calls"
    calls = list_of(message.get("tool_calls") or [], key)
    return tuple(read_call(call, f"{key}[{index}]") for index, call in enumerate(calls))


def read_call(value: Any, key: str) -> ToolCall:
    """Of {name, arguments}, or that below `function`; arguments: an object, or its JSON text."""
    call = object_of(value, key)
    if call.get("function"):
        key = f"{key}.function"
        call = object_of(call["function"], key)
    name = filled_text(call.get("name"), f"{key}.name")
    return ToolCall(name, arguments_text(call.get("arguments"), f"{key}.arguments"))


def arguments_text(value: Any, key: str) -> str:
    """The JSON text of a call's arguments, kept as it is written; none: `{}`."""
    if value is None or value == "":
        return "{}"
    parsed = from_json(value, key) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise BadRow("tool-call", f"{key}: must be a JSON object")
    return value if isinstance(value, str) else json_text(value)


def _function(value: Any, key: str) -> dict[str, Any]:
    function = object_of(value, key)
    if isinstance(function.get("function"), dict):
        function = function["function"]
    filled_text(function.get("name"), f"{key}.name")
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parameters = from_json(parameters, f"{key}.parameters") if parameters else {}
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), str):
        properties = from_json(parameters["properties"], f"{key}.parameters.properties")
        parameters = {**parameters, "properties": properties}
    return {**function, "parameters": parameters} if "parameters" in function else function
