"""A row as one text, and what a loss makes of its characters; or why it can't be one.

What a template can't express is refused here, row by row: nothing of a row is left out silently.
TextEncoder makes token ids of a conversation where nothing is trained.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError
from post_training.data.chat.rendering import MessageDicts, Part, Spans, message_dicts, render
from post_training.data.chat.templates import (
    MARKERS,
    PROBE,
    RENDERING_FAILURES,
    ChatTemplate,
    template_text,
)
from post_training.data.rows import BadRow, Conversation, Text
from post_training.data.word_tokenizer import any_of

_TOOL_NEEDS = {"tools", "calls"}
_CONTROL = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]", re.DOTALL)
_PART_OF_AN_ANSWER = re.compile(r"</?[a-z_]*(think|reason|tool|function|answer|response)[a-z_]*>")


@dataclass(frozen=True)
class Layout:
    """The text of a row. parts[i]: what the loss makes of the characters spans[i]; the others are
    context."""

    text: str
    spans: Spans
    parts: list[Part]


def control_pattern(
    backend: dict[str, Any], template: ChatTemplate, special_tokens: dict[str, str]
) -> re.Pattern[str] | None:
    """Finds a token that a content may not hold, the longest where several begin: the special ones,
    the template's markers, and of the other added tokens

    - those in brackets of control tokens: `<｜User｜>` of DeepSeek, `<|fim_prefix|>` of Qwen
    - those that the template writes outside the answers, as a role

    Others are ordinary text to a user, and answers hold them: `</think>` and `<tool_call>` of
    Qwen, `<table>` and several newlines of Gemma. backend: a tokenizer.json.
    """
    added = backend["added_tokens"]
    tokens = {token["content"] for token in added if token["special"]}
    tokens |= set(MARKERS.get(template.name, ()))
    others = {token["content"] for token in added} - tokens
    frame = _frame(template, special_tokens)
    tokens |= {
        token
        for token in others
        if _CONTROL.fullmatch(token)
        or (token in frame and token.strip() and not _PART_OF_AN_ANSWER.fullmatch(token))
    }
    return re.compile(any_of(sorted(tokens))) if tokens else None


def _frame(template: ChatTemplate, special_tokens: dict[str, str]) -> str:
    """What the template writes around the contents of a conversation of texts alone."""
    text, spans = render(template.text, message_dicts(PROBE), special_tokens)
    for start, end in reversed(spans):
        text = f"{text[:start]}\n{text[end:]}"
    return text


def lay_out(
    row: Conversation | Text,
    template: ChatTemplate,
    special_tokens: dict[str, str],
    control: re.Pattern[str] | None,
) -> Layout:
    """The text of a row, and the spans in it that have a use in the loss; a Text has no spans.

    control: finds the tokens that a content may not hold (control_pattern); None: it may hold any.
    Errors: BadRow.
    """
    if isinstance(row, Text):
        _refuse_control_tokens(row.text, control)
        layout = Layout(row.text, [], [])
    else:
        layout = _lay_out_conversation(row, template, special_tokens, control)
    try:
        layout.text.encode()
    except UnicodeEncodeError:
        raise BadRow("malformed", "the text holds half a character (lone surrogate)") from None
    return layout


def _lay_out_conversation(
    row: Conversation,
    template: ChatTemplate,
    special_tokens: dict[str, str],
    control: re.Pattern[str] | None,
) -> Layout:
    dicts = message_dicts(row)
    if missing := dicts.needs & template.lost:
        raise _bad(missing, f"chat template {template.name!r} can't express: {_list(missing)}")
    for message in dicts.messages:
        _refuse_control_tokens(message["content"], control)
        if len(message) > 2:  # a thought, or calls
            _refuse_control_tokens(json.dumps(message, ensure_ascii=False), control)
    if dicts.tools:
        _refuse_control_tokens(json.dumps(dicts.tools, ensure_ascii=False), control)
    trusted = template.name != "model"
    try:
        text, spans = render(template.text, dicts, special_tokens, trusted=trusted)
    except RENDERING_FAILURES as error:
        raise _bad(dicts.needs, f"chat template {template.name!r}: {error}") from None
    if not trusted:
        _check_contents(text, dicts)
    return Layout(text, spans, _parts_of_spans(spans, dicts.parts, template))


def _parts_of_spans(spans: Spans, messages: list[list[Part]], template: ChatTemplate) -> list[Part]:
    """The part that each span is. messages: the parts of each of the assistant's messages."""
    if template.marks == "parts":
        parts = [part for own in messages for part in own]
    else:
        parts = [own[0] for own in messages]
        if any(_use(part) != _use(own[0]) for own in messages for part in own):
            problem = f"chat template {template.name!r} can't train a part of a message alone"
            raise BadRow("roles", problem)
    if len(spans) != len(parts):
        raise BadRow(
            "roles",
            f"chat template {template.name!r} marks {len(spans)} of {len(parts)} "
            f"{template.marks} of the assistant",
        )
    return parts


def _use(part: Part) -> tuple[int, float]:
    return part.kind, part.weight


def _refuse_control_tokens(content: str, control: re.Pattern[str] | None) -> None:
    if control is not None and (found := control.search(content)):
        raise BadRow("control-token", f"the content holds the token {found.group()}")


def _check_contents(text: str, dicts: MessageDicts) -> None:
    """A model's own template may leave out a content in some rows only (earlier thoughts)."""
    for message in dicts.messages:
        for key in ("content", "reasoning_content"):
            content = message.get(key, "").strip()
            # The output of a tool may be rendered as JSON.
            if message["role"] != "tool" and content not in text:
                problem = f"chat template 'model' leaves out a {key}: {content[:40]!r}"
                raise BadRow("roles", problem)


def _bad(needs: set[str], problem: str) -> BadRow:
    return BadRow("tool-call" if needs & _TOOL_NEEDS else "roles", problem)


def _list(needs: set[str]) -> str:
    return ", ".join(sorted(needs))


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a fast tokenizer, without truncation, padding and post-processor.

    A limit is not ours to apply, and what stands at a text's ends the template writes.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return state | {"truncation": None, "padding": None, "post_processor": None}


class TextEncoder:
    """Conversations as the ids of their whole text, by a template that need not mark anything.

    For a model that judges what was written, such as a reward model, and reads it by its own
    template. A template that was made for messages of another structure drops contents, or writes
    the structure itself (`{'role': …}`): the first is refused row by row, the second before any row
    is read.
    """

    def __init__(self, tokenizer: Any, template: str):
        """template: the name of one of ours, or `model`: the tokenizer's own.

        Errors: PostTrainingError when there is none, or it writes a date or no messages.
        """
        self._where = f"chat template {template!r}"
        own = tokenizer.chat_template if template == "model" else template_text(template)
        if not isinstance(own, str):
            raise PostTrainingError("the tokenizer has no chat template", where=self._where)
        if "strftime_now" in own:
            raise PostTrainingError(
                "it writes today's date, so a judgement would differ by day", where=self._where
            )
        self._template = own
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._backend = Tokenizer.from_str(json.dumps(tokenizer_state(tokenizer)))
        self._probe()

    def encode(self, conversation: Conversation) -> list[int]:
        """Errors: BadRow for what the template can't express."""
        dicts = message_dicts(conversation)
        text = self._text(dicts)
        for said in _contents(dicts):
            if said.strip() not in text:
                problem = f"{self._where} leaves out a part: {said[:40]!r}"
                raise BadRow("tool-call" if "calls" in dicts.needs else "roles", problem)
        return self._backend.encode(text, add_special_tokens=False).ids

    def _text(self, dicts: MessageDicts) -> str:
        try:
            text, _ = render(self._template, dicts, self._special_tokens)
        except RENDERING_FAILURES as error:
            raise BadRow("roles", f"{self._where}: {error}") from None
        return text

    def _probe(self) -> None:
        dicts = message_dicts(PROBE)
        try:
            text = self._text(dicts)
        except BadRow as bad:
            raise PostTrainingError(
                f"it can't be rendered: {bad.problem}", where=self._where
            ) from None
        if missing := [said for said in _contents(dicts) if said not in text]:
            raise PostTrainingError(
                f"it leaves out {missing[0]!r}: it was made for messages of another structure",
                where=self._where,
            )
        if written := [
            key for key in ("role", "content") if f"'{key}':" in text or f'"{key}":' in text
        ]:
            raise PostTrainingError(
                f"it writes the messages' structure ({written[0]!r}), not what they say",
                where=self._where,
            )


def _contents(dicts: MessageDicts) -> list[str]:
    """Words of a row that its text must have."""
    said = []
    for message in dicts.messages:
        said += [message["content"], message.get("reasoning_content", "")]
        said += [call["function"]["name"] for call in message.get("tool_calls", ())]
    # Some wrap a function as OpenAI does.
    said += [tool.get("function", tool).get("name", "") for tool in dicts.tools]
    return said
