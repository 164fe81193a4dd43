"""Chat templates by name, and the proof that one says what is trained.

A template renders messages to text and marks the assistant's turns with `{% generation %}`. One
without the marks yields no trained token at all, and a training run that does nothing
(trl#5471), so a template is tried on a small conversation before any data is touched.
"""

import re
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

from post_training.core.errors import PostTrainingError

# Markers have to be single tokens; a template without any writes its roles as ordinary text.
MARKERS = {"chatml": ("<|im_start|>", "<|im_end|>"), "tulu": ()}
_OWN_HINT = f"use one of ours: data.chat_template: {' | '.join(MARKERS)}"

PROBE = (
    ("user", "first-question"),
    ("assistant", "first-answer"),
    ("user", "second-question"),
    ("assistant", "second-answer"),
)


@dataclass(frozen=True)
class ChatTemplate:
    """name: as configured. text: the Jinja source. end_of_turn: what the model says when done."""

    name: str
    text: str
    end_of_turn: str


Spans = list[tuple[int, int]]


def template_text(name: str) -> str:
    """The Jinja source of one of our templates."""
    folder = resources.files("post_training.data") / "templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def choose_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template `name` (`model`: the tokenizer's own), proved to work with `tokenizer`.

    Errors: PostTrainingError when it can't be used with this tokenizer, or would train nothing,
    or something else than the assistant's turns up to and including their end.
    """
    fail = partial(_fail, name)
    if name == "model":
        text = tokenizer.chat_template
        if not isinstance(text, str):
            raise fail("the tokenizer has no chat template", hint=_OWN_HINT)
        if "strftime_now" in text:
            raise fail("it writes today's date, so the data would differ by day", hint=_OWN_HINT)
    else:
        text = template_text(name)
        _check_tokens(name, text, tokenizer)
    return ChatTemplate(name, text, _prove(text, tokenizer, fail))


def render(
    conversations: list[list[dict[str, str]]], text: str, tokenizer: Any
) -> list[tuple[str, Spans]]:
    """(text, character spans of the assistant's turns) of each conversation.

    It is what `tokenizer.apply_chat_template` does, so that training and inference see one text.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=conversations,
        chat_template=text,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return list(zip(texts, spans, strict=True))


def _fail(name: str, problem: str, *, hint: str | None = None) -> PostTrainingError:
    return PostTrainingError(problem, where=f"chat template {name!r}", hint=hint)


def _check_tokens(name: str, text: str, tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS[name] if marker not in vocabulary]
    if missing:
        problem = f"the tokenizer has no token {', '.join(missing)}"
        raise _fail(name, problem, hint="use a template without markers (tulu), or add the tokens")
    if "eos_token" in text and tokenizer.eos_token is None:
        raise _fail(name, "the tokenizer has no eos token to end a turn with")


def _prove(text: str, tokenizer: Any, fail: Any) -> str:
    """Render the probe; check what it would train; return how a turn of the assistant ends."""
    from jinja2 import TemplateError

    if not re.search(r"\{%-?\s*generation\s*-?%\}", text):
        problem = "it has no {% generation %} marks, so nothing would be trained"
        raise fail(problem, hint=_OWN_HINT)
    probe = [{"role": role, "content": content} for role, content in PROBE]
    try:
        [(rendered, spans)] = render([probe], text, tokenizer)
    except TemplateError as error:
        raise fail(f"it can't be rendered: {error}") from None
    trained = [rendered[start:end] for start, end in spans]
    answers = [content for role, content in PROBE if role == "assistant"]
    questions = [content for role, content in PROBE if role == "user"]
    if len(trained) != len(answers) or any(
        answer not in turn for answer, turn in zip(answers, trained, strict=True)
    ):
        problem = f"of two answers it marks {len(trained)} turn(s) as trained: {trained}"
        raise fail(problem, hint=_OWN_HINT)
    if any(question in turn for question in questions for turn in trained):
        raise fail(f"it would train on the user's words: {trained}", hint=_OWN_HINT)
    endings = {
        turn.partition(answer)[2].strip() for answer, turn in zip(answers, trained, strict=True)
    }
    if len(endings) != 1 or endings == {""}:
        problem = f"it leaves the end of a turn untrained, the model would never stop: {trained}"
        raise fail(problem, hint=_OWN_HINT)
    return endings.pop()
