"""Chat templates by name, and the choice of one for a tokenizer.

A template renders messages (rendering.py says their form) to text. Ours mark what the assistant
wrote with `{% generation %}`: each part that may be weighed differently on its own, a thought, the
text, the calls; the last one with the end of the turn. Their texts are the public formats, but for
what would change a row: no content is stripped, and there is no date unless one is set.

A template of a model or of the user's own is used as it is. What is trained of its text is found
by its marks, or by TRL's copy of it with marks, or by a server's prompts (turns.py). Each way is
proved on the tokenizer at hand (proof.py).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from post_training.core.errors import PostTrainingError, length_in_common
from post_training.data.chat.proof import (
    PROBE,
    RENDERING_FAILURES,
    Marks,
    example_texts,
    has_marks,
    has_same_turns,
    needs_moved,
    prove,
    prove_turns,
)
from post_training.data.chat.published import (
    asks_for_date,
    fix_date,
    marked_copies,
    read_template,
)
from post_training.data.chat.rendering import message_dicts, render
from post_training.data.chat.turns import History, TurnWriter
from post_training.data.config import TEMPLATES, SpecialTokens

# The strings of our templates that must be a single token each; a template without any writes its
# roles as ordinary text.
_MISTRAL = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
MARKERS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "tulu": (),
    "zephyr": (),
    "mistral": _MISTRAL,
    "mistral-v3-tekken": _MISTRAL,
    "mistral-v7-tekken": (*_MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "apertus": (
        *("<|system_start|>", "<|system_end|>", "<|developer_start|>", "<|developer_end|>"),
        *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
        *("<|inner_prefix|>", "<|inner_suffix|>", "<|tools_prefix|>", "<|tools_suffix|>"),
    ),
    "plain": ("<|user|>", "<|assistant|>"),
}
# The line of a template of ours that can write a date, and writes none.
_NO_DATE = "{%- set date = none -%}"
# Day, weekday, month and year differ.
_TWO_DATES = (date(2001, 2, 3), date(1996, 11, 19))


@dataclass(frozen=True)
class ChatTemplate:
    """A template that was proved to work with the tokenizer at hand.

    name: as configured. text: the Jinja source, which the model is saved with. end_of_turn: what
    the model says when it is done. marks: whether it marks the parts of an assistant's message, or
    whole messages; or has none, and turns are found by prompts. lost: what a row may need
    (rendering.MessageDicts.needs) that it can't express. moves: the needs that it writes with the
    last message of the user alone, so that earlier turns stand without them. marked: the same text
    with marks, where another source has them. thinking_off: rows without thoughts are written with
    enable_thinking: false. history: as DataConfig.history_thoughts. found_by: where the marks come
    from, in words.
    """

    name: str
    text: str
    end_of_turn: str
    marks: Marks | Literal["turns"]
    lost: frozenset[str]
    moves: frozenset[str] = frozenset()
    marked: str | None = None
    thinking_off: bool = False
    history: History = "as_template"
    found_by: str = "its marks"

    @property
    def is_ours(self) -> bool:
        return self.name in TEMPLATES

    def describe(self) -> Iterator[str]:
        """What is to be known of a template that is not one of ours, in lines for a person."""
        if self.is_ours:
            return
        can_not = f"; it can't express: {', '.join(sorted(self.lost))}" if self.lost else ""
        yield (
            f"chat template {self.name!r}: trained turns are found by {self.found_by}, and end in "
            f"{self.end_of_turn!r}{can_not}"
        )
        if self.thinking_off:
            yield (
                "rows without thoughts are written with enable_thinking: false; send that at "
                "inference too (chat_template_kwargs)"
            )


def template_text(name: str, today: date | None = None) -> str:
    """The Jinja source of one of our templates. today: the date that it writes, if it can."""
    folder = resources.files("post_training.data.chat") / "jinja"
    text = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return text if today is None else text.replace(_NO_DATE, _NO_DATE.replace("none", f"'{today}'"))


def choose_template(
    name: str | Path,
    tokenizer: Any,
    *,
    train_on_thoughts: bool = True,
    today: date | None = None,
    history: History = "as_template",
) -> ChatTemplate:
    """The template `name`, proved to work with `tokenizer`. today: the date that it may write.

    Errors: PostTrainingError when it can't be used with this tokenizer, or would train nothing,
    or something else than the assistant's turns up to and including their end.
    """
    if today is not None and (problem := _problem_with_date(name, tokenizer)):
        problem = f"data.template_date is set, and the template {problem}"
        raise _fail(name, problem, hint="leave data.template_date out")
    if name not in TEMPLATES:
        return _choose_foreign(name, tokenizer, train_on_thoughts, today, history)
    name, special_tokens = str(name), tokenizer.special_tokens_map
    fail = partial(_fail, name, hint=_hint_of_ours(tokenizer))
    text = template_text(name, today)
    _check_tokens(name, text, tokenizer)
    proof = prove(text, special_tokens, fail)
    return ChatTemplate(
        name,
        text,
        proof.end_of_turn,
        proof.marks,
        proof.lost,
        moves=needs_moved(text, special_tokens, proof.lost),
        history=history,
    )


def _problem_with_date(name: str | Path, tokenizer: Any) -> str | None:
    """Why the template writes no date that is set, or None. Errors: those of read_template."""
    if name in TEMPLATES:
        asks = _NO_DATE in template_text(str(name))
        return None if asks else "asks for no date"
    original = read_template(name, tokenizer)
    if not asks_for_date(original):
        return "asks for no date"
    try:
        # A date of its own may be set before: then strftime_now stands where nothing leads.
        one, other = (
            example_texts(fix_date(original, each), tokenizer.special_tokens_map)
            for each in _TWO_DATES
        )
    except PostTrainingError:
        return None  # _choose_foreign says what is wrong
    return "has a date of its own, which it writes" if one and one == other else None


def _choose_foreign(
    name: str | Path,
    tokenizer: Any,
    train_on_thoughts: bool,
    today: date | None,
    history: History,
) -> ChatTemplate:
    """A template of a model or of the user's own."""
    hint = _hint_of_ours(tokenizer)
    fail = partial(_fail, str(name), hint=hint)
    try:
        original = read_template(name, tokenizer)
        text = fix_date(original, today)
        special_tokens = tokenizer.special_tokens_map
        if has_marks(text):
            proof = prove(text, special_tokens, fail)
            if train_on_thoughts or proof.marks == "parts" or "thought" in proof.lost:
                return ChatTemplate(
                    str(name), text, proof.end_of_turn, proof.marks, proof.lost, history=history
                )
        stops = stop_tokens(tokenizer)
        found = prove_turns(text, special_tokens, stops, fail)
    except PostTrainingError as error:
        asks = "strftime_now" in error.problem
        raise PostTrainingError(
            "it writes today's date, so the data would differ by day" if asks else error.problem,
            where=f"chat template {str(name)!r}",
            hint="fix it: data.template_date: 2026-01-31" if asks else error.hint or hint,
        ) from None
    template = ChatTemplate(
        str(name),
        text,
        found.end_of_turn,
        "turns",
        found.lost,
        thinking_off=found.thinking_off,
        history=history,
        found_by="a server's prompts",
    )
    if not train_on_thoughts and "thought" not in found.lost:
        return template
    writer = TurnWriter(text, special_tokens, found.end_of_turn)
    for copied in marked_copies(original):
        marked = fix_date(copied, today)
        if has_same_turns(writer, marked, found):
            own = {"marks": "messages", "marked": marked, "found_by": "the marks of TRL's copy"}
            return replace(template, **own)
    return template


def stop_tokens(tokenizer: Any) -> list[str]:
    """The tokens one of which ends a turn: the special ones."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    return sorted(special | set(tokenizer.all_special_tokens))


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
    return f"{said}: {first_difference(ours, theirs, 'it writes', 'where that one writes')}"


def misfit(template: ChatTemplate, tokenizer: Any) -> str | None:
    """A line where one of Mistral's formats is used with the vocabulary of another, or None.

    SentencePiece writes a space before each text, which the format of its models has too; a model
    with a tekken vocabulary never saw one there, and " Hello" is another token than "Hello".
    """
    if not template.name.startswith("mistral"):
        return None
    has_spaces, wants_spaces = "▁" in tokenizer.get_vocab(), template.name == "mistral"
    if has_spaces == wants_spaces:
        return None
    said = f"chat template {template.name!r} is for a {{}} vocabulary, and the tokenizer's is none"
    if wants_spaces:
        return said.format("SentencePiece") + ": use mistral-v3-tekken or mistral-v7-tekken"
    return said.format("tekken") + ": use mistral"


def first_difference(one: str, other: str, said: str, said_of_other: str) -> str:
    """Where two texts differ first: `it writes 'ab' where that one writes 'ac'`."""
    start = length_in_common(one, other)
    # With some characters before it: a marker that is cut in two says little.
    one, other = (text[max(0, start - 12) : start + 28] for text in (one, other))
    return f"{said} {one!r} {said_of_other} {other!r}"


def _fail(name: str | Path, problem: str, *, hint: str | None = None) -> PostTrainingError:
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
