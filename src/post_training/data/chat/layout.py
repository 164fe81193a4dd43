"""A row as text, and what a loss makes of its characters; or why it can't be one.

A row is one text; or several, where the template writes earlier turns otherwise than they were said
(turns.py).

What a template can't express is refused here, row by row: nothing of a row is left out silently.
TextEncoder makes token ids of a conversation where nothing is trained.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError
from post_training.data.chat.proof import PROBE, RENDERING_FAILURES, without_thinking
from post_training.data.chat.published import fix_date, read_template
from post_training.data.chat.rendering import MessageDicts, Part, Spans, message_dicts, render
from post_training.data.chat.templates import MARKERS, ChatTemplate, template_text
from post_training.data.chat.turns import TurnWriter, Written
from post_training.data.config import TEMPLATES
from post_training.data.rows import COMPLETION, BadRow, Conversation, Message, Text
from post_training.data.word_tokenizer import any_of

# Stands where the model's answer will, so that the template writes all that comes before it.
_ANSWER = Message("assistant", "answer", COMPLETION)
_TOOL_NEEDS = {"tools", "calls"}
_CONTROL = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]", re.DOTALL)
_PART_OF_AN_ANSWER = re.compile(r"</?[a-z_]*(think|reason|tool|function|answer|response)[a-z_]*>")


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
    frames = []
    for written in _written(template, message_dicts(PROBE), special_tokens):
        text = written.text
        for start, end in reversed(written.spans):
            text = f"{text[:start]}\n{text[end:]}"
        frames.append(text)
    return "\n".join(frames)


def lay_out(
    row: Conversation | Text,
    template: ChatTemplate,
    special_tokens: dict[str, str],
    control: re.Pattern[str] | None,
) -> list[Written]:
    """The texts of a row, and the spans in them that have a use in the loss; a Text has no spans.

    control: finds the tokens that a content may not hold (control_pattern); None: it may hold any.
    Errors: BadRow.
    """
    if isinstance(row, Text):
        _refuse_control_tokens(row.text, control)
        texts = [Written(row.text, [], [])]
    else:
        dicts = _checked_dicts(row, template, control)
        with _failures_are_bad_rows(template, dicts):
            texts = _written(template, dicts, special_tokens)
    for written in texts:
        _refuse_half_characters(written.text)
    return texts


def lay_out_prompt(
    row: Conversation,
    template: ChatTemplate,
    special_tokens: dict[str, str],
    control: re.Pattern[str] | None,
) -> str:
    """The text that a model goes on from: all that stands before its next answer.

    Errors: BadRow.
    """
    answered = Conversation((*row.messages, _ANSWER), row.tools)
    if template.marks != "turns":
        written = lay_out(answered, template, special_tokens, control)[-1]
        return written.text[: written.spans[-1][0]]
    _checked_dicts(answered, template, control)
    dicts = message_dicts(row)
    writer = TurnWriter(template.text, special_tokens, template.end_of_turn)
    with _failures_are_bad_rows(template, dicts):
        text = writer.checked_prompt(dicts, template.history)
    _refuse_half_characters(text)
    return text


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("malformed", "the text holds half a character (lone surrogate)") from None


def _checked_dicts(
    row: Conversation, template: ChatTemplate, control: re.Pattern[str] | None
) -> MessageDicts:
    """What the template gets of a row that it can express. Errors: BadRow."""
    dicts = message_dicts(row)
    if missing := dicts.needs & template.lost:
        raise _bad(missing, f"chat template {template.name!r} can't express: {_list(missing)}")
    for message in dicts.messages:
        _refuse_control_tokens(message["content"], control)
        if len(message) > 2:  # a thought, or calls
            _refuse_control_tokens(json.dumps(message, ensure_ascii=False), control)
    if dicts.tools:
        _refuse_control_tokens(json.dumps(dicts.tools, ensure_ascii=False), control)
    return dicts


@contextmanager
def _failures_are_bad_rows(template: ChatTemplate, dicts: MessageDicts) -> Iterator[None]:
    try:
        yield
    except BadRow as bad:
        if str(template.name) in bad.problem:
            raise
        problem = f"chat template {template.name!r}: {bad.problem}"
        raise BadRow(bad.reason, problem, bad.hint) from None
    except RENDERING_FAILURES as error:
        raise _bad(dicts.needs, f"chat template {template.name!r}: {error}") from None


def _written(
    template: ChatTemplate, dicts: MessageDicts, special_tokens: dict[str, str]
) -> list[Written]:
    """Errors: BadRow; RENDERING_FAILURES where the template refuses or fails."""
    writer = TurnWriter(template.text, special_tokens, template.end_of_turn)
    if template.is_ours:
        num_questions = sum(message["role"] == "user" for message in dicts.messages)
        if dicts.needs & template.moves and num_questions > 1:
            return writer.write(dicts, template.history)
        text, spans = render(template.text, dicts, special_tokens, trusted=True)
        return [Written(text, spans, _parts_of_spans(spans, dicts.parts, template))]
    dicts = without_thinking(dicts, template.thinking_off)
    if template.marks != "turns":
        if template.marked is None:
            text, spans = render(template.text, dicts, special_tokens)
        else:
            text, spans = writer.marked(template.marked, dicts)
        if template.marked is None or text == render(template.text, dicts, special_tokens)[0]:
            left_out = writer.left_out(dicts, text)
            if all(key != "reasoning_content" for _, key in left_out):
                for number, key in sorted(left_out):
                    said = dicts.messages[number][key].strip()[:40]
                    raise BadRow("roles", f"it leaves out a {key}: {said!r}")
                parts = _parts_of_spans(spans, dicts.parts, template)
                return [Written(text, spans, parts)]
    return writer.write(dicts, template.history)


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

    def __init__(self, tokenizer: Any, template: str | Path):
        """template: as choose_template's name.

        Errors: PostTrainingError when there is none, or it writes a date or no messages.
        """
        self._where = f"chat template {str(template)!r}"
        if template in TEMPLATES:
            own = template_text(str(template))
        else:
            own = fix_date(read_template(template, tokenizer), None)
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
            problem = f"it can't be rendered: {bad.problem}"
            if "strftime_now" in bad.problem:
                problem = "it writes today's date, so a judgement would differ by day"
            raise PostTrainingError(problem, where=self._where) from None
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
