"""Chat templates by name, and which rows one can express.

A template renders messages (rendering.py says their form) to text and marks what the assistant
wrote with `{% generation %}`. Ours mark each part that may be weighed differently on its own: a
thought, the text, the calls; the last one with the end of the turn. Their texts are the public
formats, but for what would change a row: no content is stripped, and there is no date.

One without the marks yields no trained token at all, and a training run that does nothing
(trl#5471), so a template is tried (proof.py) before any data is touched.
"""

from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.chat.proof import PROBE, RENDERING_FAILURES, Marks, has_marks, prove
from post_training.data.chat.rendering import message_dicts, render

# What has to be a single token each; a template without any writes its roles as ordinary text.
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


@dataclass(frozen=True)
class ChatTemplate:
    """name: as configured. text: the Jinja source. end_of_turn: what the model says when done.
    marks: whether it marks the parts of an assistant's message, or whole messages.
    lost: what a row may need (rendering.MessageDicts.needs) that it can't express."""

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
