"""What of a row is not read: counted and told, or refused where another trainer reads it.

A column or a message's field that changes what is said or trained elsewhere is never left out in
silence: its name is in the tables here, and a row that fills it is refused (columns.py:
Format.check_columns), unless its format reads it or the dataset's settings name it under `ignore`.
Any other is metadata: counted, and listed in the report and the record (columns.py: ColumnReport).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from post_training.data.formats.values import says_something

# Columns that change what a model is asked: Dolly's and SQuAD's context, alpaca's input,
# LLaMA-Factory's history, TRL's chat_template_kwargs and images, …
OF_THE_PROMPT = frozenset(
    (
        *("system", "system_prompt", "system_message", "developer", "history", "context", "input"),
        *("tools", "functions", "available_functions", "documents"),
        *("chat_template", "chat_template_kwargs"),
        *("image", "images", "video", "videos", "audio", "audios", "objects"),
    )
)
# Columns that change what is trained: KTO's label, a row's weight, marks and ids of other trainers.
OF_THE_ANSWER = frozenset(
    (
        *("reasoning", "reasoning_content", "reasoning_details", "thinking", "thought"),
        *("label", "labels", "weight", "sample_weight", "margin"),
        *("train", "trainable", "training", "loss", "loss_mask", "loss_weight", "loss_scale"),
        *("mask", "input_ids", "completion_mask", "assistant_masks"),
    )
)
# Fields of a message that say how much it is trained, where message_fields.weight names none:
# numbers, and those that are true or false (axolotl, verl, ms-swift, LLaMA-Factory, OpenAI).
WEIGHTS = ("weight", "loss_weight")
FLAGS = ("train", "trainable", "training", "loss", "loss_mask")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
# Others that change what is said or trained.
OF_A_MESSAGE = frozenset(
    (
        *(*WEIGHTS, *FLAGS, *THOUGHTS, *CALLS),
        *("label", "labels", "mask", "masked", "loss_scale"),
        *("train_detail", "training_detail", "prefix", "refusal"),
        *("reasoning_details", "thought", "tools", "functions", "documents", "context"),
        *("chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios"),
    )
)


@dataclass(frozen=True)
class Shape:
    """What is read of an object, or of each object of a list. fields: by name, with what is read
    below it; None: all of it. by_type: of its fields, those that one of each `type` is read for.
    instead: {field: another, beside which it is not read}."""

    fields: Mapping[str, "Shape | None"]
    by_type: Mapping[str, frozenset[str]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(*names: str, **below: "Shape") -> "Shape":
        return Shape({**dict.fromkeys(names), **below})


def _shape_of_parts(**types: tuple[str, ...]) -> Shape:
    by_type = {kind.replace("_", "-"): frozenset(names) for kind, names in types.items()}
    names = {"type", *(name for own in by_type.values() for name in own)}
    return Shape(dict.fromkeys(names), by_type)


# Of a call (tools.py), of a content that is a list of parts, or an object (parts.py).
OF_A_CALL = Shape.of("id", "type", "name", "arguments", function=Shape.of("name", "arguments"))
OF_TEXT_PARTS = Shape.of("type", "text")
OF_A_CONTENT = Shape.of(
    *("text", "tools"),
    parts=Shape.of("type", "text"),
    blocks=Shape.of("type", "text", calls=OF_A_CALL, outputs=Shape.of("output")),
)
# A branch may have been measured or judged: no mark of what is trained.
FIGURES_OF_A_BRANCH = frozenset(("label", "labels", "loss", "margin"))
# Of SwissAI's rows (swissai.py).
_SWISSAI_MESSAGE = Shape(
    {
        "role": None,
        "content": None,
        "parts": _shape_of_parts(
            response=("content",),
            thought=("content",),
            function_call=("name", "args", "id"),
            function_output=("content", "tool_call_id", "name"),
            verifiable_responses=("answers",),
        ),
    },
    instead={"content": "parts"},
)
OF_SWISSAI = {
    "system_prompt": Shape.of("content"),
    "earlier_messages": _SWISSAI_MESSAGE,
    "initial_prompt": _SWISSAI_MESSAGE,
    "conversation_branches": Shape.of("is_reference_completion", messages=_SWISSAI_MESSAGE),
}


def unread_below(value: Any, shape: Shape, path: str, key: str) -> Iterator[tuple[str, str]]:
    """(path, key) of every field below `value` that has something in it and is not read.

    `path` is what is counted (`messages[].content[].id`), `key` is where it stands.
    """
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield from unread_below(item, shape, f"{path}[]", f"{key}[{index}]")
        return
    if not isinstance(value, dict):
        return
    kind = value.get("type")
    own = shape.by_type.get(kind, shape.fields) if isinstance(kind, str) else shape.fields
    for name, cell in value.items():
        if name == "type" or not says_something(cell):
            continue
        other = shape.instead.get(name)
        if name not in shape.fields or (other and says_something(value.get(other))):
            yield f"{path}.{name}", f"{key}.{name}"
        elif name not in own:
            yield f"{path}.{name} of a {kind}", f"{key}.{name}"
        elif (below := shape.fields[name]) is not None:
            yield from unread_below(cell, below, f"{path}.{name}", f"{key}.{name}")


def hint_of_column(name: str, columns: str | None) -> str:
    """columns: the setting that would read it, if there is one."""
    if columns is not None:
        how = f"say that it is to be read in the dataset's settings: columns: {columns}"
    elif name == "label":
        how = "rows with a label are no examples to follow: read the good ones alone (transform: "
        how += "kto, for true or false), or choose them by a transform of your own"
    elif name == "chat_template_kwargs":
        how = "read what they say by a transform (smoltalk2, or one of your own)"
    else:
        how = "move it by a transform to where it is read"
    return f"{how}; or leave it out on purpose: ignore: [{name}]"


def hint_of_field(path: str) -> str:
    """path: `messages[].mask`."""
    name = path.rpartition(".")[2]
    how = "move it by a transform to where it is read"
    if name in (*WEIGHTS, *FLAGS):
        how = f"say that it weighs a message: message_fields: {{weight: {name}}}"
    return f'{how}; or leave it out on purpose: ignore: ["{path}"]'
