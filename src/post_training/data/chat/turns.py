"""What the assistant writes in a conversation, found without marks: by the prompts of a server.

Before each turn of the assistant a server renders the messages so far and asks the model to go on:

    prompt    the messages before the turn, with add_generation_prompt
    through   the messages up to the turn
    turn      what `through` has after `prompt`, up to and with the end of the turn

So what is trained stands after exactly what the model will be given. Where a template writes an
earlier turn otherwise once others follow (Qwen3 leaves out its thought, gpt-oss ends it by
another token), the text of the whole conversation does not have that turn as it was said. Then it
is trained in a text of its own (`as_template`), or all are put together as they were said (`keep`).

The parts of a turn (its thought, text, calls) are found by rendering it with a part changed: what
stays the same after it is what follows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from post_training.core.errors import length_in_common
from post_training.data.chat.rendering import (
    TEXT,
    THOUGHT,
    MessageDicts,
    Part,
    Spans,
    render,
)
from post_training.data.rows import COMPLETION, PROMPT, BadRow

History = Literal["as_template", "keep", "refuse"]
_HISTORY_HINT = (
    "train each turn after the history that a server sends: data.history_thoughts: as_template, "
    "or keep"
)
# They have neither a beginning nor an end in common, and no template takes them apart.
_WORDS = ("one-unusual-word", "zebra")


@dataclass(frozen=True)
class Written:
    """A text to be trained. parts[i]: what the loss makes of the characters spans[i].
    num_left_out: earlier thoughts that a server won't send, and the text doesn't have."""

    text: str
    spans: Spans
    parts: list[Part]
    num_left_out: int = 0


@dataclass(frozen=True)
class _Turn:
    """number: of the assistant's dicts. text: the conversation up to it, num_messages messages, of
    which start:end is what the model says."""

    number: int
    num_messages: int
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class TurnWriter:
    """Writes conversations by a template without marks. source: Jinja. end_of_turn: what ends a
    turn; a turn without it is whole."""

    source: str
    special_tokens: dict[str, str]
    end_of_turn: str

    def prompt(self, dicts: MessageDicts) -> str:
        """What a server gives the model to go on from. Errors: those of `render`."""
        return render(self.source, dicts, self.special_tokens, add_generation_prompt=True)[0]

    def marked(self, copied: str, dicts: MessageDicts) -> tuple[str, Spans]:
        """The text by a copy of the template with marks, and its turns: what is marked, but for
        white space after the end of a turn, which a model that stops there never writes."""
        text, spans = render(copied, dicts, self.special_tokens)
        return text, [(start, start + len(text[start:end].rstrip())) for start, end in spans]

    def checked_prompt(self, dicts: MessageDicts, history: History) -> str:
        """The prompt of a conversation that the model is to go on with.

        Errors: BadRow where the template leaves out something that `history` wants there.
        """
        text = self.prompt(dicts)
        if self.left_out(dicts, text) and history == "keep":
            every = [self._turn(dicts, number) for number in range(len(dicts.parts))]
            text = self._keep(dicts, every, self.prompt).text
            self._check_left_out(_contents_left_out(dicts, text), every, dicts, "keep")
        else:
            self._check_left_out(self.left_out(dicts, text), [], dicts, history)
        return text

    def write(self, dicts: MessageDicts, history: History) -> list[Written]:
        """The texts by which the conversation's turns are trained, in order.

        A turn that is not trained is in none for its own sake; where no turn is, the whole
        conversation is one text.
        Errors: BadRow where the template leaves out something, or doesn't write a turn after its
        prompt; those of `render`.
        """
        whole = self._render(dicts)
        used = [
            number
            for number, own in enumerate(dicts.parts)
            if any(part.kind != PROMPT for part in own)
        ]
        turns = [self._turn(dicts, number) for number in used]
        texts = self._share(whole, turns)
        if history == "keep" and len(texts) > 1:
            return [self._keep(dicts, turns, self._render)]
        if history == "refuse" and len(texts) > 1:
            raise BadRow(
                "roles",
                "the template writes an earlier turn otherwise than the model said it",
                _HISTORY_HINT,
            )
        written = []
        for text, num_messages, own in texts:
            left_out = self.left_out(dicts.up_to(num_messages), text)
            self._check_left_out(left_out, own, dicts, history)
            if own and not any(
                p.kind == COMPLETION for turn in own for p in dicts.parts[turn.number]
            ):
                continue  # Turns of weight 0, which are there in the texts of later ones.
            spans, parts = self._parts(dicts, own)
            written.append(Written(text, spans, parts, len(left_out)))
        return written or [Written(whole, [], [])]

    def _render(self, dicts: MessageDicts) -> str:
        return render(self.source, dicts, self.special_tokens)[0]

    def _turn(self, dicts: MessageDicts, number: int) -> _Turn:
        index = _indices(dicts)[number]
        prompt, text = self.prompt(dicts.up_to(index)), self._render(dicts.up_to(index + 1))
        if not text.startswith(prompt):
            start = max(0, length_in_common(prompt, text) - 12)  # some characters before it
            raise BadRow(
                "roles",
                f"the template asks for the answer by {prompt[start:]!r}, and then writes "
                f"{text[start : start + 40]!r}",
            )
        turn = text[len(prompt) :]
        end = turn.rfind(self.end_of_turn)
        length = len(turn.rstrip()) if end < 0 else end + len(self.end_of_turn)
        return _Turn(number, index + 1, text, len(prompt), len(prompt) + length)

    @staticmethod
    def _share(whole: str, turns: list[_Turn]) -> list[tuple[str, int | None, list[_Turn]]]:
        """The texts that have every turn as it was said, as few as there can be; how many messages
        each has (None: all); and its turns."""
        texts: list[tuple[str, int | None, list[_Turn]]] = [(whole, None, [])]
        for turn in reversed(turns):
            text, _, own = texts[-1]
            if text[: turn.end] == turn.text[: turn.end]:
                own.insert(0, turn)
            else:
                texts.append((turn.text, turn.num_messages, [turn]))
        if len(texts) > 1 and not texts[0][2]:
            del texts[0]
        return texts[::-1]

    def _keep(
        self, dicts: MessageDicts, turns: list[_Turn], write: Callable[[MessageDicts], str]
    ) -> Written:
        """All turns as they were said, with what the template writes between them. turns: those
        that have a use in the loss. write: renders the end of the conversation."""
        every = [self._turn(dicts, number) for number in range(len(dicts.parts))]
        used = {turn.number for turn in turns}
        text, spans, parts = "", [], []
        for turn in every:
            if turn.number == 0:
                text = turn.text[: turn.start]
            else:
                text += self._between(dicts, turn.number)
            if turn.number in used:
                own, named = self._parts(dicts, [turn])
                moved = len(text) - turn.start
                spans += [(start + moved, end + moved) for start, end in own]
                parts += named
            text += turn.text[turn.start : turn.end]
        last = _indices(dicts)[-1]
        if last + 1 < len(dicts.messages):
            text += self._after(dicts, len(every) - 1, write)
        else:
            text += every[-1].text[every[-1].end :]
        self._check_left_out(_contents_left_out(dicts, text), every, dicts, "keep")
        return Written(text, spans, parts)

    def _between(self, dicts: MessageDicts, number: int) -> str:
        """What stands between the end of the turn before and this one."""
        before = dicts.up_to(_indices(dicts)[number])
        return self._after(before, number - 1, self.prompt)

    def _after(self, dicts: MessageDicts, number: int, write: Callable[[MessageDicts], str]) -> str:
        """What stands after the end of a turn. write: renders the conversation."""
        own = write(dicts)
        rest = _in_common_at_the_end(*map(write, _changed(dicts, number, -1)))
        _, end, after = rest.partition(self.end_of_turn)
        if not end or not own.endswith(after):
            raise BadRow("roles", "what the template writes between two turns depends on them")
        return after

    def _parts(self, dicts: MessageDicts, turns: list[_Turn]) -> tuple[Spans, list[Part]]:
        """The spans of turns, or of their parts where the loss treats them differently."""
        spans: Spans = []
        parts: list[Part] = []
        for turn in turns:
            own = dicts.parts[turn.number]
            if len({(part.kind, part.weight) for part in own}) == 1:
                spans.append((turn.start, turn.end))
                parts.append(own[0])
                continue
            through = dicts.up_to(_indices(dicts)[turn.number] + 1)
            bounds = [turn.start]
            for which in range(len(own) - 1):
                changed = map(self._render, _changed(through, turn.number, which))
                rest = _in_common_at_the_end(*changed)
                bounds.append(len(turn.text) - len(rest))
                if not turn.text.endswith(rest) or not bounds[-2] < bounds[-1] < turn.end:
                    raise BadRow("roles", "the template can't train a part of a message alone")
            bounds.append(turn.end)
            spans += pairwise(bounds)
            parts += own
        return spans, parts

    def left_out(self, dicts: MessageDicts, text: str) -> set[tuple[int, str]]:
        """The contents that a text does not have, as (message, field)."""
        skeleton = json.dumps([_with_words(dicts), dicts.tools, dicts.enable_thinking])
        tokens = tuple(sorted(self.special_tokens.items()))
        return set(_words_left_out(self.source, skeleton, tokens)) | _contents_left_out(dicts, text)

    def _check_left_out(
        self,
        left_out: set[tuple[int, str]],
        turns: list[_Turn],
        dicts: MessageDicts,
        history: History,
    ) -> None:
        """Only the thoughts of earlier turns may be missing, and only where that was asked."""
        trained = {_indices(dicts)[turn.number] for turn in turns}
        for number, key in sorted(left_out):
            said = dicts.messages[number].get(key, "").strip()[:40]
            if key != "reasoning_content" or number in trained:
                raise BadRow("roles", f"the template leaves out a {key}: {said!r}")
            if history != "as_template":
                problem = f"the template leaves out the thought of an earlier turn: {said!r}"
                raise BadRow("roles", problem, _HISTORY_HINT)


def _indices(dicts: MessageDicts) -> list[int]:
    """Of the assistant's dicts among the messages."""
    return [n for n, message in enumerate(dicts.messages) if message["role"] == "assistant"]


def _in_common_at_the_end(one: str, other: str) -> str:
    return one[len(one) - length_in_common(one[::-1], other[::-1]) :]


def _changed(dicts: MessageDicts, number: int, which: int) -> list[MessageDicts]:
    """The conversation with a part of one of the assistant's dicts changed, in two ways."""
    index, what = _indices(dicts)[number], dicts.parts[number][which].what
    variants = []
    for word in _WORDS:
        message = dict(dicts.messages[index])
        if what == THOUGHT:
            message["reasoning_content"] = word
        elif what == TEXT:
            message["content"] = word
        else:
            last = dict(message["tool_calls"][-1])
            last["function"] = {**last["function"], "arguments": {"key": word}}
            message["tool_calls"] = [*message["tool_calls"][:-1], last]
        messages = [*dicts.messages[:index], message, *dicts.messages[index + 1 :]]
        variants.append(replace(dicts, messages=messages))
    return variants


def _with_words(dicts: MessageDicts) -> list[dict[str, Any]]:
    """The messages with a word of its own for each content; the same for rows of the same form."""
    messages = []
    for number, message in enumerate(dicts.messages):
        changed = dict(message)
        for key in ("content", "reasoning_content"):
            if message.get(key):
                changed[key] = f"word-{number}-{key.split('_')[0]}."
        if "tool_calls" in message:
            changed["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": {"key": "value"}}}
                for call in message["tool_calls"]
            ]
        messages.append(changed)
    return messages


def _contents_left_out(dicts: MessageDicts, text: str) -> set[tuple[int, str]]:
    # The output of a tool may be rendered as JSON.
    return {
        (number, key)
        for number, message in enumerate(dicts.messages)
        for key in ("content", "reasoning_content")
        if message["role"] != "tool" and message.get(key, "").strip() not in text
    }


@lru_cache(maxsize=4096)
def _words_left_out(
    source: str, skeleton: str, special_tokens: tuple[tuple[str, str], ...]
) -> tuple[tuple[int, str], ...]:
    messages, tools, enable_thinking = json.loads(skeleton)
    dicts = MessageDicts(messages, [], tools, set(), enable_thinking)
    text, _ = render(source, dicts, dict(special_tokens))
    return tuple(
        (number, key)
        for number, message in enumerate(messages)
        for key in ("content", "reasoning_content")
        if message.get(key) and message[key] not in text
    )
