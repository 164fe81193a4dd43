"""A chosen and a rejected answer to one prompt.

Answers alone, as text or as messages, have their prompt in a column of its own. Where chosen and
rejected are whole conversations, the prompt is what both begin with.

A model may have said nothing: its sample is then the token that ended it, and that is trained. So
an answer may be empty where its token ids stand beside it; an empty text alone is a mistake.
"""

from typing import Any, Literal

from post_training.core.errors import shown
from post_training.data.formats.columns import (
    FIGURE_FLAGS,
    FIGURE_LISTS,
    FIGURE_NUMBERS,
    FIGURES,
    INSTRUCTION,
    Format,
    read_prompt,
    read_side,
    read_system,
    read_tools_column,
    tools_of,
)
from post_training.data.formats.messages import (
    Entry,
    check_turns,
    exclude_thoughts,
    mark_answers,
    mark_as_context,
)
from post_training.data.formats.tools import Tools
from post_training.data.formats.values import is_number, says_something
from post_training.data.rows import SIDES, BadRow, Message, Preference

_FLAG = "_is_truncated"


def read_preference(value: dict[str, Any], found: Format, *, train_on_thoughts: bool) -> Preference:
    """A preference of a row of format `found`. Errors: BadRow."""
    value = found.visible(value)
    own = read_tools_column(value, found)
    chosen, declared = _read_answer(value, found, "chosen", own)
    rejected, _ = _read_answer(value, found, "rejected", own)
    if _is_answer(chosen) and _is_answer(rejected):
        _check_there_is_a_prompt(value, found)
        prompt, declared = read_prompt(value, found, "prompt", own)
    else:
        prompt, chosen, rejected = _common_prompt(chosen, rejected)
        _check_prompt_column(value, found, prompt)
    prompt = read_system(value, found, prompt) + prompt
    chosen, rejected = (
        check_turns(prompt + answer)[len(prompt) :] for answer in (chosen, rejected)
    )
    prompt = check_turns(prompt + chosen)[: len(prompt)]
    figures = _figures(value)
    _refuse_equal(chosen, rejected, figures)
    return Preference(
        exclude_thoughts(mark_as_context(prompt), train_on_thoughts),
        exclude_thoughts(mark_answers(chosen, "all_turns"), train_on_thoughts),
        exclude_thoughts(mark_answers(rejected, "all_turns"), train_on_thoughts),
        tools_of(own, declared, found),
        figures,
    )


def _read_answer(
    value: dict[str, Any], found: Format, side: Literal["chosen", "rejected"], tools: Tools
) -> tuple[list[Entry], Tools]:
    if value.get("prompt_token_ids") and value.get(f"{side}_token_ids"):
        column = found.columns[side]
        given, key = value.get(column), column
        match given:
            case [{**message}] if message.get(found.messages.role) == "assistant":
                given, key = message.get(found.messages.content), f"{column}[0]"
        if isinstance(given, str) and not given.strip():
            return [Entry(key, (Message("assistant", given),))], ()
    return read_side(value, found, side, "assistant", tools)


def _refuse_equal(chosen: list[Entry], rejected: list[Entry], figures: dict[str, Any]) -> None:
    """Two answers that are the same train nothing. What was sampled may differ where the texts
    don't: then the token ids say so."""
    ids = [figures.get(f"{side}_token_ids") for side in SIDES]
    if None not in ids and "prompt_token_ids" in figures and ids[0] != ids[1]:
        return
    if [entry.messages for entry in chosen] == [entry.messages for entry in rejected]:
        raise BadRow("untrained", "chosen and rejected are the same")


def _is_answer(entries: list[Entry]) -> bool:
    return bool(entries) and entries[0].messages[0].role == "assistant"


def _common_prompt(
    chosen: list[Entry], rejected: list[Entry]
) -> tuple[list[Entry], list[Entry], list[Entry]]:
    length = 0
    while length < min(len(chosen), len(rejected)) and (
        chosen[length].messages == rejected[length].messages
    ):
        length += 1
    if length == len(chosen) == len(rejected):
        raise BadRow("untrained", "chosen and rejected are the same")
    for name, answer in (("chosen", chosen[length:]), ("rejected", rejected[length:])):
        if not answer:
            raise BadRow("untrained", f"{name}: is the beginning of the other")
        if not _is_answer(answer):
            raise BadRow("roles", f"{answer[0].key}: the prompts of chosen and rejected differ")
    return chosen[:length], chosen[length:], rejected[length:]


def _check_prompt_column(value: dict[str, Any], found: Format, prompt: list[Entry]) -> None:
    """A prompt beside whole conversations says nothing new, or something else is wrong."""
    column = found.column("prompt", value)
    if column is None or value.get(column) is None:
        return
    # Compared without white space: many datasets strip one of the two, or have other line ends.
    said = [message.content.split() for entry in prompt for message in entry.messages]
    entries, _ = read_prompt(value, found, "prompt")
    for entry in entries:
        if any(message.content.split() not in said for message in entry.messages):
            raise BadRow("columns", f"{entry.key}: is not what chosen and rejected begin with")


def _check_there_is_a_prompt(value: dict[str, Any], found: Format) -> None:
    if found.lacks_prompt(value):
        raise BadRow(
            "columns",
            f"no column of the prompt is named, and the row has: {', '.join(value)}",
            "say which it is in the dataset's settings: "
            f"columns: {found.mapping_with(prompt=INSTRUCTION)}",
        )


def _figures(value: dict[str, Any]) -> dict[str, Any]:
    """Errors: BadRow for a figure that is used and is no number. One that nobody asked for may be
    anything."""
    figures = {}
    for column, figure in value.items():
        if not column.startswith(FIGURES) or not says_something(figure):
            continue
        numbers = figure if isinstance(figure, list) else [figure]
        if column in FIGURE_FLAGS or (column.endswith(_FLAG) and isinstance(figure, bool)):
            if figure not in (0, 1):
                raise _wrong_figure(column, "true or false", figure)
            figures[column] = figure
        elif all(map(is_number, numbers)):
            figures[column] = figure
        elif column in FIGURE_LISTS:
            raise _wrong_figure(column, "a list of finite numbers", figure)
        elif column in FIGURE_NUMBERS:
            raise _wrong_figure(column, "a finite number", figure)
    return figures


def _wrong_figure(column: str, wanted: str, figure: Any) -> BadRow:
    hint = f"write it as such by a transform; or leave it out on purpose: ignore: [{column}]"
    return BadRow("columns", f"{column}: must be {wanted} (got {shown(figure, limit=60)})", hint)
