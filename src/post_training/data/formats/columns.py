"""What a dataset's rows were recognised as, and what stands in the columns of one row."""

from dataclasses import dataclass, field
from typing import Any, Literal

from post_training.data.config import FORMATS
from post_training.data.formats.messages import Entry, MessageNames, read_messages
from post_training.data.formats.tools import Tools, read_tools
from post_training.data.formats.values import filled_text, required, text
from post_training.data.rows import BadRow, Message


@dataclass(frozen=True)
class Format:
    """name: of FORMATS. columns: {its column: the file's}. takes_optional: an optional column that
    is not among them is looked for under its own name. has_messages: the row that decided had a
    list of them.
    """

    name: str
    columns: dict[str, str]
    messages: MessageNames = field(default_factory=MessageNames)
    takes_optional: bool = True
    has_messages: bool = False

    def describe(self) -> str:
        """`messages (conversations: from, value)`, `alpaca (instruction, output; input)`."""
        needed, _ = FORMATS[self.name]
        words = ", ".join(self.columns[column] for column in needed)
        if self.has_messages:
            words += f": {self.messages.role}, {self.messages.content}"
        optional = [given for column, given in self.columns.items() if column not in needed]
        if optional:
            words += f"; {', '.join(optional)}"
        return f"{self.name} ({words})"

    def column(self, name: str) -> str | None:
        """The file's column for `name`; None where there is to be none."""
        may_be_there = self.takes_optional and name in FORMATS[self.name][1]
        return self.columns.get(name, name if may_be_there else None)


def read_side(
    value: dict[str, Any], found: Format, name: str, role: Literal["user", "assistant"]
) -> tuple[list[Entry], Tools]:
    """A prompt or an answer: a text, which is `role`'s, or a list of messages."""
    column = found.column(name)
    if column is None:
        raise BadRow("columns", f"no column for {name} is named in the settings")
    given = required(value, column)
    if isinstance(given, list):
        return read_messages(given, column, found.messages)
    return [Entry(column, (Message(role, filled_text(given, column)),))], ()


def read_instruction(value: dict[str, Any], found: Format) -> list[Entry]:
    """Of alpaca: the input, if any, follows the instruction after an empty line."""
    column = found.columns["instruction"]
    instruction = filled_text(required(value, column), column)
    added = found.column("input")
    if added and value.get(added) is not None and text(value[added], added).strip():
        instruction = f"{instruction}\n\n{value[added]}"
    return [Entry(column, (Message("user", instruction),))]


def read_system(value: dict[str, Any], found: Format, entries: list[Entry]) -> list[Entry]:
    """The system message that stands in a column of its own, if any, before `entries`."""
    column = found.column("system")
    if column is None or value.get(column) is None or not text(value[column], column).strip():
        return []
    if entries and entries[0].messages[0].role == "system":
        raise BadRow("roles", f"{column}: the messages have a system message of their own")
    return [Entry(column, (Message("system", value[column]),))]


def read_tools_column(value: dict[str, Any], found: Format, declared: Tools) -> Tools:
    """Of the column, else those that the messages declare."""
    column = found.column("tools")
    return (read_tools(value.get(column), column) if column else ()) or declared
