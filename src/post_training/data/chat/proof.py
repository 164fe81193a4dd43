"""The proof that a chat template trains what it promises, on small conversations of known words.

What a template can't express it must refuse, or a row would lose a part of its content silently;
templates of models do drop things. So each need of a row (a system message, a thought, tools, …)
is tried once, and what was not rendered, or not marked right, is refused in every row.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError

from post_training.core.errors import PostTrainingError
from post_training.data.chat.rendering import Spans, message_dicts, render
from post_training.data.rows import COMPLETION, Conversation, Message, ToolCall

Marks = Literal["parts", "messages"]
RENDERING_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

PROBE = Conversation(
    (
        Message("user", "first-question"),
        Message("assistant", "first-answer", COMPLETION),
        Message("user", "second-question"),
        Message("assistant", "second-answer", COMPLETION),
    )
)
_QUESTION, _ANSWER = PROBE.messages[:2]
_CALL = ToolCall("some_function", '{"key": "an-argument"}')
_TOOL = """{"type": "function", "function": {
    "name": "some_function", "description": "a-purpose",
    "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}
}}"""
_OUTPUT = Message("tool", "an-output")
_THOUGHT = Message("assistant", "first-answer", thought="a-thought")
_TEXT_AND_CALL = Message("assistant", "some-words", tool_calls=(_CALL,))
# What a row may need, and the conversations of which a template must render one.
_NEEDS: dict[str, tuple[Conversation, ...]] = {
    "system": (Conversation((Message("system", "a-system-message"), _QUESTION, _ANSWER)),),
    "developer": (Conversation((Message("developer", "a-developer"), _QUESTION, _ANSWER)),),
    "thought": (Conversation((_QUESTION, _THOUGHT)),),
    "tools": (Conversation((_QUESTION, _ANSWER), (_TOOL,)),),
    "calls": (
        Conversation((_QUESTION, _TEXT_AND_CALL, _OUTPUT, _ANSWER)),
        Conversation((_QUESTION, Message("assistant", "", tool_calls=(_CALL,)), _OUTPUT, _ANSWER)),
    ),
    "steps": (Conversation((_QUESTION, Message("assistant", "some-words"), _ANSWER)),),
}


@dataclass(frozen=True)
class Proof:
    """marks: one span for each part of the assistant's messages, or one for a whole message.
    lost: the needs that it can't express. end_of_turn: what the model says when it is done."""

    marks: Marks
    lost: frozenset[str]
    end_of_turn: str


def has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def prove(
    template: str, special_tokens: dict[str, str], fail: Callable[[str], PostTrainingError]
) -> Proof:
    """fail: makes the error of a problem, raised when the template can't be used at all."""
    endings = set()
    for conversation in (PROBE, Conversation(PROBE.messages[:2])):
        try:
            text, spans = render(template, message_dicts(conversation), special_tokens)
        except RENDERING_FAILURES as error:
            raise fail(f"it can't be rendered: {error}") from None
        endings |= _endings_of_turns(text, spans, conversation, fail)
    # Where the document ends there may be more than where a turn does.
    end_of_turn = min(endings, key=len)
    if not end_of_turn:
        raise fail("it leaves the end of a turn untrained, the model would never stop")
    if not all(ending.startswith(end_of_turn) for ending in endings):
        raise fail(f"its turns end differently: {sorted(endings)}")

    possible: set[Marks] = {"parts", "messages"}
    lost = set()
    for need, conversations in _NEEDS.items():
        fitting = [_fitting_marks(template, each, special_tokens) for each in conversations]
        fitting = [marks & possible for marks in fitting if marks & possible]
        if need == "steps" and fitting:
            text, _ = render(template, message_dicts(conversations[0]), special_tokens)
            if end_of_turn in text.partition("some-words")[2].partition("first-answer")[0]:
                fitting = []
        for marks in fitting:
            possible &= marks
        if not fitting:
            lost.add(need)
    return Proof("parts" if "parts" in possible else "messages", frozenset(lost), end_of_turn)


def _endings_of_turns(
    text: str,
    spans: Spans,
    conversation: Conversation,
    fail: Callable[[str], PostTrainingError],
) -> set[str]:
    """What is trained after each answer, of a conversation with a text alone in each turn."""
    trained = [text[start:end] for start, end in spans]
    answers = [each.content for each in conversation.messages if each.role == "assistant"]
    questions = [each.content for each in conversation.messages if each.role == "user"]
    if len(trained) != len(answers) or any(
        answer not in turn for answer, turn in zip(answers, trained, strict=True)
    ):
        raise fail(f"of {len(answers)} answers it marks {len(trained)} as trained: {trained}")
    if any(question in turn for question in questions for turn in trained):
        raise fail(f"it would train on the user's words: {trained}")
    return {
        turn.partition(answer)[2].strip() for answer, turn in zip(answers, trained, strict=True)
    }


def _fitting_marks(
    template: str, conversation: Conversation, special_tokens: dict[str, str]
) -> set[Marks]:
    """Which marks the template makes here; none if it drops something, or marks another's words."""
    try:
        text, spans = render(template, message_dicts(conversation), special_tokens)
    except RENDERING_FAILURES:
        return set()
    own: list[list[str]] = []
    others = ["a-purpose"] if conversation.tools else []
    for message in conversation.messages:
        if message.role == "assistant":
            words = [message.thought, message.content, message.tool_calls and "an-argument"]
            own.append([word for word in words if word])
        else:
            others.append(message.content)
    words = [word for words in own for word in words]
    marked = [
        [word for word in (*words, *others) if word in text[start:end]] for start, end in spans
    ]
    if not all(word in text for word in others):
        return set()
    fitting: set[Marks] = set()
    if marked == [[word] for word in words]:
        fitting.add("parts")
    if marked == own:
        fitting.add("messages")
    return fitting
