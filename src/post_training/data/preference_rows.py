"""Preference rows as the stages write them, and read them to add to them.

    {"conversation_id", "prompt", "chosen", "rejected": messages, "tools"?, figures…}

Of a row in any form that formats/preference.py reads, the columns of the pair come out in this one;
all others stay as they are. Messages have the form of chat/rendering.py.
"""

from collections.abc import Sequence
from typing import Any

from post_training.core.hashing import sha256_value
from post_training.data.branches import ID
from post_training.data.chat.rendering import message_dicts
from post_training.data.formats.columns import Format, names_looked_for
from post_training.data.formats.preference import read_preference
from post_training.data.formats.tools import unwrap_function
from post_training.data.formats.values import filled_text
from post_training.data.rows import SIDES, Conversation, Message, Preference

_COLUMNS = {name: name for name in ("prompt", *SIDES)}
FORMAT = Format("preference", _COLUMNS, optional=names_looked_for("preference", _COLUMNS))
_OF_THE_PAIR = ("prompt", *SIDES, "system", "tools")


def preference_row(value: dict[str, Any], found: Format) -> dict[str, Any]:
    """value: a row of format `found`. conversation_id is the row's, or the sha256 of the pair.

    Errors: BadRow.
    """
    pair = read_preference(value, found, train_on_thoughts=True)
    own = written_pair(pair.prompt, (pair.chosen, pair.rejected), pair.tools)
    used = {given for name in _OF_THE_PAIR for given in found.names(name)}
    others = {name: cell for name, cell in value.items() if name not in used}
    row = {ID: value.get(ID), **own, **others}
    if row[ID] is None:
        row[ID] = sha256_value(own)
    filled_text(row[ID], ID)
    return row


def written_pair(
    prompt: Sequence[Message], answers: tuple[Sequence[Message], ...], tools: Sequence[str]
) -> dict[str, Any]:
    """The columns of a pair: prompt, chosen, rejected, and tools where there are some."""
    row: dict[str, Any] = {"prompt": _dicts(prompt)}
    row |= {side: _dicts(answer) for side, answer in zip(SIDES, answers, strict=True)}
    if tools:
        row["tools"] = [unwrap_function(tool) for tool in tools]
    return row


def read_written_pair(row: dict[str, Any]) -> Preference:
    """The pair of a row that `preference_row` or a stage wrote. Errors: BadRow."""
    return read_preference(row, FORMAT, train_on_thoughts=True)


def _dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return message_dicts(Conversation(tuple(messages))).messages
