"""From a row's JSON object to the row type, by the format that its file was recognised to have.

    messages            every turn of the assistant is trained, or the last, or as messages say
    prompt_completion   the completion's messages, or text
    alpaca              the output
    text                all of it
    preference          the messages, or text, of chosen and rejected
    swissai             as messages, for each branch that is not for reference
    prompt              nothing: it is for annotation

Columns that a format doesn't name are metadata; one that changes what is said or trained elsewhere
has been refused before (columns.py: Format.look_over).
"""

from typing import Any, Literal

from post_training.data.config import FORMATS
from post_training.data.formats.columns import (
    Format,
    read_prompt,
    read_side,
    read_system,
    read_tools_column,
    tools_of,
)
from post_training.data.formats.messages import (
    Entry,
    as_context,
    check_turns,
    marked,
    read_messages,
    with_thoughts,
)
from post_training.data.formats.preference import read_preference
from post_training.data.formats.swissai import read_branches
from post_training.data.formats.tools import Tools
from post_training.data.formats.values import filled_text, required
from post_training.data.rows import COMPLETION, BadRow, Conversation, Row, Text


def parse(
    value: dict[str, Any],
    found: Format,
    *,
    train_on: Literal["all_turns", "last_turn"],
    train_on_thoughts: bool,
) -> list[Row]:
    """The rows of a JSON object: one, but for the branches of swissai. Errors: BadRow."""
    value = found.visible(value)
    match found.name:
        case "text":
            column = found.columns["text"]
            return [Text(filled_text(required(value, column), column))]
        case "prompt":
            raise BadRow("untrained", "a prompt without an answer")
        case "preference":
            return [read_preference(value, found, train_on_thoughts=train_on_thoughts)]
        case "swissai":
            return [
                _conversation(opening, entries, tools, train_on, train_on_thoughts)
                for opening, entries, tools in read_branches(value, found.columns, found.messages)
            ]
    own = read_tools_column(value, found)
    if found.name == "messages":
        column = found.columns["messages"]
        given = required(value, column)
        answers, declared = read_messages(given, column, found.messages, own)
        prompt = []
    else:
        train_on = "all_turns"  # What is trained is said by its place.
        asked, answered = FORMATS[found.name][0]  # prompt and completion, or as alpaca has it
        prompt, declared = read_prompt(value, found, asked, own)
        answers, _ = read_side(value, found, answered, "assistant", own or declared)
    prompt = read_system(value, found, prompt or answers) + prompt
    tools = tools_of(own, declared, found)
    return [_conversation(prompt, answers, tools, train_on, train_on_thoughts)]


def _conversation(
    prompt: list[Entry],
    entries: list[Entry],
    tools: Tools,
    train_on: Literal["all_turns", "last_turn"],
    train_on_thoughts: bool,
) -> Conversation:
    checked = check_turns(prompt + entries)
    prompt, entries = checked[: len(prompt)], checked[len(prompt) :]
    answers = marked(entries, train_on)
    if not any(message.kind == COMPLETION for message in answers):
        column = entries[-1].key.partition("[")[0] if entries else "messages"
        raise BadRow("untrained", f"{column}: no assistant message to train on")
    return Conversation(with_thoughts(as_context(prompt) + answers, train_on_thoughts), tools)
