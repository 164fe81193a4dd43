"""An assistant's turn in parts (thoughts, calls, their outputs, responses), as SwissAI writes it.

    [thought, response, call, output, response] -> assistant, tool, assistant

Also the structured contents of SwissAI's linearised messages: system {text}, developer {tools},
user {parts}, assistant {blocks}; and OpenAI's content in parts, [{type: text, text}]. Arrow gives
every part all fields, empty where not used.
"""

from typing import Any, Literal

from post_training.data.formats.tools import Tools, read_call, read_tools
from post_training.data.formats.values import (
    filled_text,
    list_of,
    object_of,
    required,
    text,
    wrong_type,
)
from post_training.data.rows import BadRow, Message, Role, ToolCall

Step = (
    tuple[Literal["thought", "response"], str]
    | tuple[Literal["call"], ToolCall]
    | tuple[Literal["output"], Message]
)


def assemble(steps: list[Step], key: str) -> tuple[Message, ...]:
    """The messages of a turn: each thinks, then speaks, then calls; outputs stand between."""
    messages: list[Message] = []
    thought: str | None = None
    content: str | None = None
    calls: list[ToolCall] = []

    def close() -> None:
        nonlocal thought, content, calls
        if thought is not None or content is not None or calls:
            messages.append(
                Message("assistant", content or "", thought=thought, tool_calls=tuple(calls))
            )
        thought, content, calls = None, None, []

    for kind, value in steps:
        match kind:
            case "thought":
                close()
                thought = value
            case "response":
                if content is not None or calls:
                    close()
                content = value
            case "call":
                calls.append(value)
            case "output":
                close()
                messages.append(value)
    close()
    if not messages:
        raise BadRow("empty", f"{key}: is empty")
    return tuple(messages)


def require_one_text(texts: list[str], key: str) -> str:
    """How several would be joined is not said, so there has to be one."""
    if len(texts) != 1:
        raise BadRow("columns", f"{key}: must have one part with text (got {len(texts)})")
    return filled_text(texts[0], key)


def text_of_parts(content: list[Any], key: str, joined_by: str | None) -> str | None:
    """The text of a content in parts, as OpenAI's API takes it; None for no part.

    joined_by: what the settings put between several texts. They are not joined without it:
    templates that take parts join them by nothing, vLLM by a line break.
    Errors: BadRow for them, and for parts that are no text.
    """
    texts = []
    for index, given in enumerate(content):
        place = f"{key}[{index}]"
        part = object_of(given, place)
        if part.get("type") != "text":
            raise BadRow(
                "columns",
                f"{place}: a part of type {part.get('type')!r}, and only text is read",
                "a model of text alone can't be shown images, audio or video: leave such rows out, "
                "by a transform or by on_error: skip",
            )
        texts.append(text(part.get("text"), f"{place}.text"))
    if len(texts) > 1 and joined_by is None:
        raise BadRow(
            "columns",
            f"{key}: {len(texts)} parts of text, and servers differ in what they put between them",
            "join them as the model's server does, in the dataset's settings: message_fields: "
            '{parts_joined_by: ""}, or "\\n" as vLLM',
        )
    return (joined_by or "").join(texts) if texts else None


def declared_tools(content: dict[str, Any], key: str) -> Tools:
    """Of a linearised developer message."""
    return read_tools(required(content, "tools", key), f"{key}.tools")


def read_blocks(role: Role, content: dict[str, Any], key: str, tools: Tools) -> tuple[Message, ...]:
    """A linearised message's content. Errors: BadRow."""
    match role:
        case "system":
            return (Message("system", text(required(content, "text", key), f"{key}.text")),)
        case "user":
            key = f"{key}.parts"
            parts = list_of(content.get("parts"), key)
            texts = [
                text(object_of(part, key).get("text"), f"{key}[{index}].text")
                for index, part in enumerate(parts)
            ]
            return (Message("user", require_one_text(texts, key)),)
        case "assistant":
            key = f"{key}.blocks"
            steps: list[Step] = []
            for index, block in enumerate(list_of(content.get("blocks"), key)):
                steps += _steps(object_of(block, f"{key}[{index}]"), f"{key}[{index}]", tools)
            return assemble(steps, key)
    raise wrong_type(key, "a string", content)


def _steps(block: dict[str, Any], key: str, tools: Tools) -> list[Step]:
    match block.get("type"):
        case "thoughts":
            return [("thought", filled_text(block.get("text"), f"{key}.text"))]
        case "response":
            return [("response", filled_text(block.get("text"), f"{key}.text"))]
        case "tool_calls":
            calls = list_of(block.get("calls"), f"{key}.calls")
            return [
                ("call", read_call(call, f"{key}.calls[{index}]", tools))
                for index, call in enumerate(calls)
            ]
        case "tool_outputs":
            outputs = list_of(block.get("outputs"), f"{key}.outputs")
            texts = [
                text(object_of(each, key).get("output"), f"{key}.outputs[{index}]")
                for index, each in enumerate(outputs)
            ]
            return [("output", Message("tool", output)) for output in texts]
    known = "thoughts, tool_calls, tool_outputs, response"
    raise BadRow("columns", f"{key}.type: must be one of {known} (got {block.get('type')!r})")
