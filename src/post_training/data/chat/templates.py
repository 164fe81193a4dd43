"""Chat templates by name, and the proof that one trains what it promises.

A template renders messages (rendering.py says their form) to text and marks what the assistant
wrote with `{% generation %}`. Ours mark each part that may be weighed differently on its own: a
thought, the text, the calls; the last one with the end of the turn. Their texts are the public
formats, but for what would change a row: no content is stripped, and there is no date.

A template without the marks yields no trained token at all, and a training run that does nothing
(trl#5471). And what a template can't express it must refuse, or a row would lose a part of its
content silently; templates of models do drop things. So `prove` tries a template on small
conversations of known words before any data is read: each need of a row (a system message, a
thought, tools, …) once, and what was not rendered, or not marked right, is refused in every row.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, Literal

from jinja2 import TemplateError

from post_training.core.errors import PostTrainingError
from post_training.data.chat.rendering import Spans, message_dicts, render
from post_training.data.config import SpecialTokens
from post_training.data.rows import COMPLETION, Conversation, Message, ToolCall

Marks = Literal["parts", "messages"]
RENDERING_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# The strings of our templates that must be a single token each; a template without any writes its
# roles as ordinary text.
MARKERS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "tulu": (),
    "zephyr": (),
    "mistral": (
        *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "apertus": (
        *("<|system_start|>", "<|system_end|>", "<|developer_start|>", "<|developer_end|>"),
        *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
        *("<|inner_prefix|>", "<|inner_suffix|>", "<|tools_prefix|>", "<|tools_suffix|>"),
    ),
    "plain": ("<|user|>", "<|assistant|>"),
}
_MARKS_HINT = (
    "copy the tokenizer's folder, put {% generation %} and {% endgeneration %} around what the "
    "assistant writes, up to the end of its turn, in the copy's chat_template.jinja, and name the "
    "copy"
)
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
class ChatTemplate:
    """A template that was proved to work with the tokenizer at hand.

    name: as configured. text: the Jinja source. end_of_turn: what the model says when it is done.
    marks: whether it marks the parts of an assistant's message, or whole messages. lost: what a row
    may need (rendering.MessageDicts.needs) that it can't express.
    """

    name: str
    text: str
    end_of_turn: str
    marks: Marks
    lost: frozenset[str]


def template_text(name: str) -> str:
    """The Jinja source of one of our templates."""
    folder = resources.files("post_training.data.chat") / "jinja"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def choose_template(name: str, tokenizer: Any, *, train_on_thoughts: bool = True) -> ChatTemplate:
    """The template `name` (`model`: the tokenizer's own), proved to work with `tokenizer`.

    Errors: PostTrainingError when it can't be used with this tokenizer, or would train nothing,
    or something else than the assistant's turns up to and including their end; or when thoughts
    are not to be trained, and it doesn't mark them apart.
    """
    fail, own_hint = partial(_fail, name), _hint_of_ours(tokenizer)
    if name == "model":
        text = tokenizer.chat_template
        if not isinstance(text, str):
            raise fail("the tokenizer has no chat template", hint=own_hint)
        if "strftime_now" in text:
            raise fail("it writes today's date, so the data would differ by day", hint=own_hint)
        if not has_marks(text):
            problem = "it has no {% generation %} marks, so nothing would be trained"
            raise fail(problem, hint=f"{_MARKS_HINT}; or {own_hint}")
    else:
        text = template_text(name)
        _check_tokens(name, text, tokenizer)
    proof = prove(text, tokenizer.special_tokens_map, partial(fail, hint=own_hint))
    if not train_on_thoughts and proof.marks == "messages":
        problem = "it marks a thought and its answer as one, so it can't leave out the thought"
        raise fail(problem, hint=own_hint)
    return ChatTemplate(name, text, proof.end_of_turn, proof.marks, proof.lost)


def difference_from_own(template: ChatTemplate, tokenizer: Any) -> str | None:
    """A line where the tokenizer's own template writes a short conversation otherwise, or None."""
    own = tokenizer.chat_template
    if not isinstance(own, str) or own == template.text:
        return None
    said = f"chat template {template.name!r} is not the tokenizer's own"
    dicts, special_tokens = message_dicts(PROBE), tokenizer.special_tokens_map
    ours, _ = render(template.text, dicts, special_tokens)
    try:
        theirs, _ = render(own, dicts, special_tokens)
    except (*RENDERING_FAILURES, PostTrainingError):
        return f"{said}, which can't be rendered"
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    start = next((at for at, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    # With some characters before it: a marker that is cut in two says little.
    ours, theirs = (text[max(0, start - 12) : start + 28] for text in (ours, theirs))
    return f"{said}: it writes {ours!r} where that one writes {theirs!r}"


def _fail(name: str, problem: str, *, hint: str | None = None) -> PostTrainingError:
    return PostTrainingError(problem, where=f"chat template {name!r}", hint=hint)


def _hint_of_ours(tokenizer: Any) -> str:
    """Names those of our templates whose tokens the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    fitting = [name for name, own in MARKERS.items() if all(each in vocabulary for each in own)]
    return "use one of ours that this tokenizer has the tokens of: data.chat_template: " + (
        " | ".join(fitting)
    )


def _check_tokens(name: str, text: str, tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS[name] if marker not in vocabulary]
    if missing:
        problem = f"the tokenizer has no token {', '.join(missing)}"
        raise _fail(name, problem, hint="use a template without markers (tulu), or add the tokens")
    for marker in MARKERS[name]:
        ids = tokenizer.encode(marker, add_special_tokens=False)
        if ids != [vocabulary[marker]]:
            problem = f"the tokenizer splits {marker} into {len(ids)} tokens"
            raise _fail(name, problem, hint="make it an added token of the tokenizer")
    for token in ("bos_token", "eos_token"):
        if token in text and getattr(tokenizer, token) is None:
            hint = f"set data.special_tokens.{token}"
            raise _fail(name, f"it writes the {token}, and the tokenizer has none", hint=hint)


def with_special_tokens(tokenizer: Any, settings: SpecialTokens) -> Any:
    """A copy of the tokenizer with the bos, eos and pad tokens that the settings name; where they
    name none, the tokenizer itself.

    Errors: PostTrainingError for a token that is not in the vocabulary: its embedding would have
    been trained by nobody.
    """
    named = settings.model_dump(exclude_none=True)
    if not named:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    for setting, token in named.items():
        if token not in vocabulary:
            raise PostTrainingError(
                f"the tokenizer has no token {token!r}", where=f"data.special_tokens.{setting}"
            )
    changed = copy.deepcopy(tokenizer)
    # As special tokens, so that where a template writes one it is never split.
    changed.add_special_tokens(named)
    return changed


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
