"""A row as the message dicts that a chat template gets, and its text.

The dicts are those of transformers and of OpenAI's interface, so that a template saved with a
model works at inference too:

    {"role": "system" | "developer" | "user", "content": "…"}
    {"role": "tool", "content": "…", "tool_call_id": "…", "name": "…"}
    {"role": "assistant", "content": "…", "reasoning_content": "…",
     "tool_calls": [{"id": "…", "type": "function",
                     "function": {"name": "…", "arguments": {…}}}]}
    tools: [{"type": "function", "function": {…}}]

Ids and an output's name are there where the row has them: a template that prints them (mistral)
prints the row's own, as at inference.

An assistant's dict has up to three *parts*, in this order: its thought, its text, its calls. Its
messages in a row are joined into one dict as long as that order allows. A template may also look
at `tools`, at `enable_thinking` (true where a row has thoughts) and at `add_generation_prompt`
(true where a server asks the model to go on).
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from post_training.core.errors import PostTrainingError
from post_training.data.rows import BadRow, Conversation, Message

THOUGHT, TEXT, CALLS = range(3)
# Of processor time, for one row. A template that ends needs a thousandth of a second.
_TIMEOUT_S = 20.0

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Part:
    """A part of an assistant's dict. what: THOUGHT, TEXT or CALLS. kind, weight: as in
    rows.Message."""

    what: int
    kind: int
    weight: float


@dataclass(frozen=True)
class MessageDicts:
    """What a template gets of a row.

    parts: of each assistant's dict. needs: what not every template can express, of: system,
    developer, thought, tools, calls, steps (two dicts of the assistant one after the other).
    enable_thinking: None leaves it to the template.
    """

    messages: list[dict[str, Any]]
    parts: list[list[Part]]
    tools: list[Any]
    needs: set[str]
    enable_thinking: bool | None = None

    def up_to(self, num_messages: int | None) -> "MessageDicts":
        """The same with its first messages alone; None: with all."""
        return replace(self, messages=self.messages[:num_messages])

    def variables(self) -> dict[str, Any]:
        """The variables by which a template gets this."""
        variables: dict[str, Any] = {"messages": self.messages, "tools": self.tools or None}
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        return variables


def message_dicts(conversation: Conversation) -> MessageDicts:
    """Errors: BadRow when a call's arguments or a tool are not JSON."""
    messages: list[dict[str, Any]] = []
    parts: list[list[Part]] = []
    needs: set[str] = set()
    for message in conversation.messages:
        if message.role != "assistant":
            own_dict = {"role": message.role, "content": message.content}
            if message.role == "tool":
                ids = {"tool_call_id": message.tool_call_id, "name": message.name}
                own_dict |= {name: value for name, value in ids.items() if value is not None}
            messages.append(own_dict)
            if message.role != "user":
                needs.add("calls" if message.role == "tool" else message.role)
            continue
        own = _parts_of(message)
        if messages and messages[-1]["role"] == "assistant":
            if parts[-1][-1].what < own[0].what:
                parts[-1] += own
                messages[-1] |= _contents(message, own, needs)
                continue
            needs.add("steps")
        parts.append(own)
        messages.append({"role": "assistant", "content": "", **_contents(message, own, needs)})
    tools = [_json(tool, "tool") for tool in conversation.tools]
    if tools:
        needs.add("tools")
    return MessageDicts(messages, parts, tools, needs, True if "thought" in needs else None)


def _parts_of(message: Message) -> list[Part]:
    parts = []
    if message.thought:
        parts.append(Part(THOUGHT, message.kind, message.weight))
    if message.content or not (message.thought or message.tool_calls):
        parts.append(Part(TEXT, message.kind, message.weight))
    if message.tool_calls:
        parts.append(Part(CALLS, message.kind, message.weight))
    return parts


def _contents(message: Message, parts: list[Part], needs: set[str]) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for part in parts:
        if part.what == TEXT:
            contents["content"] = message.content
        elif part.what == THOUGHT:
            contents["reasoning_content"] = message.thought
            needs.add("thought")
        else:
            contents["tool_calls"] = [
                {
                    **({} if call.id is None else {"id": call.id}),
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": _json(call.arguments, f"the arguments of {call.name}"),
                    },
                }
                for call in message.tool_calls
            ]
            needs.add("calls")
    return contents


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadRow("tool-call", f"{what}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow("tool-call", f"{what}: must be a JSON object (got {text[:40]})")
    return value


def render(
    template: str,
    dicts: MessageDicts,
    special_tokens: dict[str, str],
    *,
    trusted: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[str, Spans]:
    """The text, and the spans of characters that the template marks as the assistant's.

    It is what `tokenizer.apply_chat_template` does, so that training and inference see one text.
    trusted: a template of ours, which needs no sandbox (half the time of a longer template).
    Errors: jinja2.TemplateError when the template refuses; TypeError and the like when it fails;
    PostTrainingError when it doesn't end.
    """
    blocks: list[str] = []
    spans: Spans = []
    length = 0
    with nullcontext() if trusted else _bounded(dicts):
        for block in _compiled(template, trusted).generate(
            **special_tokens,
            **dicts.variables(),
            documents=None,
            add_generation_prompt=add_generation_prompt,
        ):
            if type(block) is _Marked:
                spans.append((length, length + len(block)))
            blocks.append(block)
            length += len(block)
    return "".join(blocks), spans


class _NoEnd(Exception):
    """A template took more than its time."""


def _end(_number: int, _frame: object) -> NoReturn:
    raise _NoEnd


@contextmanager
def _bounded(dicts: MessageDicts) -> Iterator[None]:
    """Within it the template of a model's folder runs, whose loops may have no end.

    It is ended by the processor time that it took, which no other load of the machine adds to.
    """
    is_main = threading.current_thread() is threading.main_thread()  # Only there signals arrive.
    if is_main:
        if signal.getsignal(signal.SIGVTALRM) is not _end:
            signal.signal(signal.SIGVTALRM, _end)
        signal.setitimer(signal.ITIMER_VIRTUAL, _TIMEOUT_S)
    try:
        yield
    except _NoEnd:
        raise PostTrainingError(
            f"rendering one row took more than {_TIMEOUT_S:g} s of processor time: the one with "
            f"{dicts.messages[0]['content'][:40]!r}",
            where="chat template",
            hint="does it loop without an end? use one of ours, or mend it",
        ) from None
    except (ArithmeticError, RecursionError, MemoryError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from None
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


class _Marked(str):
    """What stood between generation marks."""


class _GenerationMarks(Extension):
    """`{% generation %}…{% endgeneration %}`. As in transformers, but a marked text comes out as a
    block of its own type: no state, and no joining of all text so far at each mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return _Marked(caller())


@lru_cache(maxsize=8)
def _compiled(template: str, trusted: bool) -> Template:
    """The template, in an environment equal to transformers'; today's date is not offered."""
    environment = (Environment if trusted else ImmutableSandboxedEnvironment)(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)
