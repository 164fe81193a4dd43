"""Tools (functions that a model may call), and its calls of them.

A tool is kept as a server is sent it, {"type": "function", "function": {…}}, whether a row has that
or the function alone: a template prints what it gets, and gets the same at inference.

Arrow has one type for a column. It gives every tool the parameters of all others, and every call
their arguments, as null; this padding is taken off again. Tools and arguments that are JSON text
are what was written, and stay so.
"""

import json
from typing import Any

from post_training.data.formats.values import (
    filled_text,
    from_json,
    json_text,
    list_of,
    object_of,
)
from post_training.data.rows import BadRow, ToolCall

# JSON text of each tool.
Tools = tuple[str, ...]

# Keys of a JSON Schema that hold values, so that their null may be meant; and those that hold
# schemas by name.
_VALUES = ("default", "const", "enum", "example", "examples")
_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_AS_TEXT = "keep tools and arguments as JSON text, where a null stays apart from Arrow's padding"
_TEXT = "keep outputs as JSON text, where a null stays apart from Arrow's padding"


def read_tools(value: Any, key: str) -> Tools:
    """The tools of a list, or of its JSON text. Errors: BadRow."""
    is_text = isinstance(value, str)
    if is_text:
        value = from_json(value, key) if value.strip() else None
    if value is None:
        return ()
    tools = list_of(value, key)
    return tuple(
        json_text(_tool(tool, f"{key}[{index}]", is_padded=not is_text), f"{key}[{index}]")
        for index, tool in enumerate(tools)
    )


def wrap_function(function: dict[str, Any]) -> dict[str, Any]:
    """A function as a server is sent it."""
    if function.get("type") == "function":  # flat, as OpenAI's newer interface has it
        function = {name: value for name, value in function.items() if name != "type"}
    return {"type": "function", "function": function}


def unwrap_function(tool: str) -> Any:
    """A tool's function alone, where its wrapping says nothing more."""
    value = json.loads(tool)
    function = value.get("function")
    return function if value == {"type": "function", "function": function} else value


def read_calls(message: dict[str, Any], key: str, tools: Tools) -> tuple[ToolCall, ...]:
    """The calls of OpenAI's `tool_calls`, or of the older `function_call`. tools: those that may be
    called."""
    calls = list_of(message.get("tool_calls") or [], f"{key}.tool_calls")
    if message.get("function_call"):
        if calls:
            problem = f"{key}: calls stand in tool_calls and in function_call"
            raise BadRow("tool-call", problem)
        return (read_call(message["function_call"], f"{key}.function_call", tools),)
    return tuple(
        read_call(call, f"{key}.tool_calls[{index}]", tools) for index, call in enumerate(calls)
    )


def read_call(value: Any, key: str, tools: Tools) -> ToolCall:
    """A call from {name, arguments}, or from that below `function`. The arguments are an object, or
    its JSON text."""
    call = object_of(value, key)
    call_id = call.get("id")
    if call.get("function"):
        key = f"{key}.function"
        call = object_of(call["function"], key)
    name = filled_text(call.get("name"), f"{key}.name")
    arguments = arguments_text(call.get("arguments"), f"{key}.arguments", name, tools)
    return ToolCall(name, arguments, None if call_id in (None, "") else str(call_id))


def arguments_text(value: Any, key: str, name: str, tools: Tools) -> str:
    """The JSON text of the arguments of a call of `name`, kept where it is text; none: `{}`."""
    if value is None or value == "":
        return "{}"
    parsed = from_json(value, key) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise BadRow("tool-call", f"{key}: must be a JSON object")
    if isinstance(value, str):
        return value
    if _has_null(value):
        value = _without_padding(value, _parameters(name, tools), key)
    return json_text(value, key)


def output_text(value: Any, key: str) -> str:
    """The JSON text of a tool's output that is no text. A null may be Arrow's padding, or meant."""
    if _has_null(value):
        raise BadRow("tool-call", f"{key}: holds a null, which the tool may not have given", _TEXT)
    return json_text(value, key)


def _tool(value: Any, key: str, *, is_padded: bool) -> dict[str, Any]:
    tool = object_of(value, key)
    if is_padded:
        tool = _without_nulls(tool)
    if not isinstance(tool.get("function"), dict):
        return wrap_function(_function(tool, key, is_padded=is_padded))
    function = _function(tool["function"], f"{key}.function", is_padded=is_padded)
    return {**({} if "type" in tool else {"type": "function"}), **tool, "function": function}


def _function(function: dict[str, Any], key: str, *, is_padded: bool) -> dict[str, Any]:
    if is_padded:
        function = _without_nulls(function)
    filled_text(function.get("name"), f"{key}.name")
    if "parameters" not in function:
        return function
    parameters = function["parameters"]
    if isinstance(parameters, str):
        parameters = from_json(parameters, f"{key}.parameters") if parameters else {}
    elif is_padded:
        parameters = _schema(parameters)
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), str):
        properties = from_json(parameters["properties"], f"{key}.parameters.properties")
        parameters = {**parameters, "properties": properties}
    return {**function, "parameters": parameters}


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in value.items() if each is not None}


def _schema(value: Any) -> Any:
    """A JSON Schema without null where it can't be meant: a property that is null is none."""
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema: dict[str, Any] = {}
    for name, each in value.items():
        if name in _VALUES and (each is not None or name in ("default", "const")):
            schema[name] = each
        elif name in _BY_NAME and isinstance(each, dict):
            schema[name] = {own: _schema(item) for own, item in each.items() if item is not None}
        elif each is not None:
            schema[name] = _schema(each)
    return schema


def _parameters(name: str, tools: Tools) -> Any:
    """The schema of a function's parameters; None where it is not declared."""
    for tool in map(json.loads, tools):
        function = tool.get("function", tool)
        if isinstance(function, dict) and function.get("name") == name:
            return function.get("parameters") or {"properties": {}}
    return None


def _has_null(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_null, value.values() if isinstance(value, dict) else value))
    return value is None


def _without_padding(value: Any, schema: Any, key: str) -> Any:
    """Arguments without those that are null and that the function does not have."""
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [_without_padding(each, items, f"{key}[{i}]") for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    declared = schema.get("properties") if isinstance(schema, dict) else None
    kept: dict[str, Any] = {}
    for name, each in value.items():
        own = declared.get(name) if isinstance(declared, dict) else None
        if each is not None:
            kept[name] = _without_padding(each, own, f"{key}.{name}")
        elif not isinstance(declared, dict):
            problem = f"{key}.{name}: is null, and no tool says whether it is an argument"
            raise BadRow("tool-call", problem, _AS_TEXT)
        elif name in declared:
            kept[name] = None
    return kept
