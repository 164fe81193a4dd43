"""The proof that a chat template trains what it promises, before any data is read.

A template without marks yields no trained token at all, and a training run that does nothing
(trl#5471); and templates of models drop things. So a template is tried on small conversations of
known words: each need of a row (a system message, a thought, tools, …) once, and what was not
rendered, or not marked right, is refused in every row.

    prove          a template with `{% generation %}` marks
    prove_turns    one without, whose turns are found by a server's prompts (turns.py)
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from jinja2 import TemplateError

from post_training.core.errors import PostTrainingError, length_in_common
from post_training.data.chat.rendering import MessageDicts, Spans, message_dicts, render
from post_training.data.chat.turns import TurnWriter
from post_training.data.rows import COMPLETION, BadRow, Conversation, Message, ToolCall

Marks = Literal["parts", "messages"]
RENDERING_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# The conversation that every template is tried on; then what the others are made of.
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
_SEVERAL_THOUGHTS = (_QUESTION, _THOUGHT, *PROBE.messages[2:])
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
    """What `prove` found of a template: the marks, lost and end_of_turn of ChatTemplate."""

    marks: Marks
    lost: frozenset[str]
    end_of_turn: str


def has_marks(template: str) -> bool:
    """Whether the template has `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def prove(
    template: str, special_tokens: dict[str, str], fail: Callable[[str], PostTrainingError]
) -> Proof:
    """Try the template on known conversations.

    special_tokens: by the names that a template has for them. fail: makes the error of a problem;
    it is raised when the template can't be used at all.
    """
    endings = set()
    for conversation in (PROBE, Conversation(PROBE.messages[:2])):
        try:
            text, spans = render(template, message_dicts(conversation), special_tokens)
        except RENDERING_FAILURES as error:
            raise fail(f"it can't be rendered: {error}") from None
        endings |= _endings_of_turns(text, spans, conversation, fail)
    # After the last turn a template may write more (an end of the text): the shortest is that of
    # the turn.
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


def needs_moved(
    template: str, special_tokens: dict[str, str], lost: frozenset[str]
) -> frozenset[str]:
    """The needs that a template with marks writes with the last message of the user alone.

    In the text of a longer conversation an earlier turn then stands without them, where a server
    had sent them before it.
    """
    moved = set()
    for need in ("system", "tools"):
        if need in lost:
            continue
        [short] = _NEEDS[need]
        longer = replace(short, messages=(*short.messages, *PROBE.messages[2:]))
        first, whole = (
            render(template, message_dicts(each), special_tokens)[0] for each in (short, longer)
        )
        answered = first.index(_ANSWER.content)
        if first[:answered] != whole[:answered]:
            moved.add(need)
    return frozenset(moved)


@dataclass(frozen=True)
class TurnProof:
    """What `prove_turns` found: lost and end_of_turn as in ChatTemplate. thinking_off: rows without
    thoughts are written with enable_thinking: false."""

    lost: frozenset[str]
    end_of_turn: str
    thinking_off: bool


def prove_turns(
    template: str,
    special_tokens: dict[str, str],
    stops: Iterable[str],
    fail: Callable[[str], PostTrainingError],
) -> TurnProof:
    """Try a template without marks on known conversations.

    stops: the tokenizer's special tokens, one of which ends a turn, if any stands after an answer.
    The others as in `prove`.
    """
    asked, answered = (message_dicts(Conversation(PROBE.messages[:n])) for n in (1, 2))
    prompts = []
    for thinking_off in (False, True):
        try:
            prompt, text = (
                render(template, each, special_tokens, add_generation_prompt=last)[0]
                for each, last in (
                    (without_thinking(asked, thinking_off), True),
                    (without_thinking(answered, thinking_off), False),
                )
            )
        except RENDERING_FAILURES as error:
            raise fail(f"it can't be rendered: {error}") from None
        if text.startswith(prompt):
            break
        prompts.append((prompt, text))
    else:
        prompt, text = prompts[0]
        same = length_in_common(prompt, text)
        raise fail(
            f"at inference a prompt ends in {prompt[same:]!r}, where training text has "
            f"{text[same:][:40]!r}"
        )
    answer = PROBE.messages[1].content
    _, found, rest = text[len(prompt) :].partition(answer)
    if not found:
        raise fail(f"it leaves out an answer: {text!r}")
    end_of_turn = _first_stop(rest.strip(), stops)
    if not end_of_turn:
        raise fail("it writes nothing after an answer, so the model would never stop")
    writer = TurnWriter(template, special_tokens, end_of_turn)
    problem = _problem_with_turns(writer, PROBE, thinking_off)
    if problem:
        raise fail(problem)
    lost = {
        need
        for need, conversations in _NEEDS.items()
        if all(_problem_with_turns(writer, each, thinking_off) for each in conversations)
    }
    return TurnProof(frozenset(lost), end_of_turn, thinking_off)


def has_same_turns(writer: TurnWriter, marked: str, proof: TurnProof) -> bool:
    """Whether a copy of the writer's template with marks writes the same texts, and marks the same
    turns, each as one."""
    conversations = [PROBE]
    for need, own in _NEEDS.items():
        conversations += [] if need in proof.lost else own
    for conversation in conversations:
        if _problem_with_turns(writer, conversation, proof.thinking_off):
            continue
        dicts = without_thinking(message_dicts(_trained(conversation)), proof.thinking_off)
        texts = writer.write(dicts, "as_template")
        try:
            text, spans = writer.marked(marked, dicts)
        except RENDERING_FAILURES:
            return False
        if len(texts) != 1 or (texts[0].text, texts[0].spans) != (text, spans):
            return False
    return True


def example_rows() -> list[tuple[str, Conversation]]:
    """A conversation for each need of a row, and of several turns, by name; all is trained."""
    rows = [("several turns", PROBE)]
    for need, own in _NEEDS.items():
        rows.append((need, own[0]))
    rows.append(("several thoughts", Conversation(_SEVERAL_THOUGHTS)))
    return [(name, _trained(row)) for name, row in rows]


def example_texts(template: str, special_tokens: dict[str, str]) -> list[str]:
    """The texts of the example rows, of those that the template can render, with thinking as it
    likes, on and off."""
    texts = []
    for _, row in example_rows():
        for thinking in (None, True, False):
            dicts = replace(message_dicts(row), enable_thinking=thinking)
            try:
                texts.append(render(template, dicts, special_tokens)[0])
            except RENDERING_FAILURES:
                continue
    return texts


def without_thinking(dicts: MessageDicts, thinking_off: bool) -> MessageDicts:
    """The row, with thinking switched off where that is asked and it has no thoughts."""
    if thinking_off and dicts.enable_thinking is None:
        return replace(dicts, enable_thinking=False)
    return dicts


def _first_stop(rest: str, stops: Iterable[str]) -> str:
    """What stands after an answer, up to the first token that can stop a model."""
    ends = [rest.find(stop) + len(stop) for stop in stops if stop and stop in rest]
    return rest[: min(ends, default=len(rest))]


def _problem_with_turns(
    writer: TurnWriter, conversation: Conversation, thinking_off: bool
) -> str | None:
    """Why a conversation is not written right, or None."""
    dicts = message_dicts(_trained(conversation))
    try:
        texts = writer.write(without_thinking(dicts, thinking_off), "as_template")
    except BadRow as bad:
        return bad.problem
    except RENDERING_FAILURES as error:
        return str(error)
    trained = "".join(text.text[start:end] for text in texts for start, end in text.spans)
    own, others = [], ["a-purpose"] if conversation.tools else []
    for message in conversation.messages:
        if message.role == "assistant":
            words = (message.thought, message.content, message.tool_calls and "an-argument")
            own += [word for word in words if word]
        else:
            others.append(message.content)
    if missing := [word for word in own if trained.count(word) != 1]:
        return f"it would train {missing[0]!r} {trained.count(missing[0])} times"
    if wrong := [word for word in others if word in trained]:
        return f"it would train on the user's words: {wrong[0]!r}"
    if missing := [word for word in others if not any(word in text.text for text in texts)]:
        return f"it leaves out {missing[0]!r}"
    between = texts[-1].text.partition("some-words")[2].partition("first-answer")[0]
    if writer.end_of_turn in between and "an-argument" not in between:
        return "it ends the turn between two messages of the assistant"
    return None


def _trained(conversation: Conversation) -> Conversation:
    """The conversation with all of the assistant's messages to be trained."""
    messages = tuple(
        replace(message, kind=COMPLETION) if message.role == "assistant" else message
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)
