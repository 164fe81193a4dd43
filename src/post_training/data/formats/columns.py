"""The columns of a dataset's rows.

    Format         what the rows were recognised as; checks the columns of each row
    read_side, …   what stands in the columns of one row
    ColumnReport   what was read of all rows and what was not, for the log and the record

Reader.values counts a chunk's rows (ColumnCounts), read_chunks adds the counts up in order. They
are of all rows that were looked at, bad ones too, and don't depend on the number of workers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from post_training.data.config import FORMATS
from post_training.data.formats.messages import (
    ROLES,
    Entry,
    MessageNames,
    is_structured,
    read_messages,
)
from post_training.data.formats.tools import Tools, read_tools
from post_training.data.formats.unread import (
    FIGURES_OF_A_BRANCH,
    OF_A_CALL,
    OF_A_CONTENT,
    OF_A_MESSAGE,
    OF_SWISSAI,
    OF_TEXT_PARTS,
    OF_THE_ANSWER,
    OF_THE_PROMPT,
    hint_of_column,
    hint_of_field,
    unread_below,
)
from post_training.data.formats.values import filled_text, required, says_something, text
from post_training.data.rows import SIDES, BadRow, Message

# The names that an optional column has in files. An input only goes with an instruction.
OPTIONAL = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "prompt": ("prompt",),
}
# What alpaca calls a prompt; LLaMA-Factory's preferences too.
INSTRUCTION = "instruction"
# The columns of SwissAI's rows, which swissai.py reads by these names.
_SWISSAI = ("system_prompt", "earlier_messages", "available_functions")
_OF_BOTH = OF_THE_PROMPT | OF_THE_ANSWER
# What alignment stages write beside a pair: ref_chosen_logprob, chosen_reward, prompt_token_ids, …
FIGURES = ("prompt_", "chosen_", "rejected_", "ref_")
# Of these, what is read (data/pairs/prepare.py).
FIGURE_FLAGS = frozenset(("chosen_is_truncated", "rejected_is_truncated"))
TOKEN_IDS = frozenset(("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"))
FIGURE_LISTS = TOKEN_IDS | {"ref_rewards"}
FIGURE_NUMBERS = frozenset(
    column.format(side)
    for side in SIDES
    for column in ("ref_{}_logprob", "{}_reward", "{}_quantile_reward")
)
_READ_FIGURES = FIGURE_FLAGS | FIGURE_LISTS | FIGURE_NUMBERS
# The columns that make up a format: the report need not tell that they are read.
_NEEDED = tuple({name for needed, _ in FORMATS.values() for name in needed})
_MOST_COLUMNS = 12  # in a line of the log; the record has all


def names_looked_for(
    name: str, columns: dict[str, str], ignored: frozenset[str] = frozenset()
) -> dict[str, tuple[str, ...]]:
    """The file's names for each optional column of a format that `columns` don't say. Every row is
    looked at: a column may be filled in later rows alone."""
    asked = columns.get("instruction") or columns.get("prompt")
    return {
        column: tuple(given for given in OPTIONAL[column] if given not in ignored)
        for column in FORMATS[name][1]
        if column not in columns and (column != "input" or asked == INSTRUCTION)
    }


@dataclass(frozen=True)
class Format:
    """What the rows of a dataset were recognised as.

    name: a key of FORMATS. columns: {its column: the file's}. messages: what a message's fields are
    called. optional: for each column that `columns` doesn't name, the names that are looked for in
    each row. has_messages: the row that decided had a list of messages. ignored: columns and fields
    that the settings say not to read. figures: what the stage reads of a pair's figures.
    """

    name: str
    columns: dict[str, str]
    messages: MessageNames = field(default_factory=MessageNames)
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict)
    has_messages: bool = False
    ignored: frozenset[str] = field(default=frozenset(), compare=False)
    figures: frozenset[str] = field(default=_READ_FIGURES, compare=False)

    def describe(self) -> str:
        """`messages (conversations: from, value)`, `prompt_completion (question, answer)`."""
        needed, _ = FORMATS[self.name]
        words = ", ".join(self.columns[column] for column in needed)
        if self.has_messages:
            words += f": {self.messages.role}, {self.messages.content}"
        optional = [given for column, given in self.columns.items() if column not in needed]
        if optional:
            words += f"; {', '.join(optional)}"
        return f"{self.name} ({words})"

    def names(self, column: str) -> tuple[str, ...]:
        """The file's names for a column; none where there is to be none."""
        if column in self.columns:
            return (self.columns[column],)
        return self.optional.get(column, ())

    def column(self, name: str, row: dict[str, Any]) -> str | None:
        """The file's column for `name`, the one that this row fills.

        Errors: BadRow where it fills two, with different contents.
        """
        if name in self.columns:
            return self.columns[name]
        names = self.names(name)
        filled = [given for given in names if given in row and says_something(row[given])]
        if not filled:
            return names[0] if names else None
        if any(row[given] != row[filled[0]] for given in filled[1:]):
            problem = f"{' and '.join(filled)} both say the {name}"
            raise BadRow("columns", problem, f"leave one out: ignore: [{filled[1]}]")
        return filled[0]

    def reads(self, path: str) -> str | None:
        """What a column (`tools`) or a message's field (`messages[].tool_calls`) is read as."""
        if path in self.ignored:
            return None
        if "[]." in path:
            return self.messages.reads(path.partition("[].")[2])
        for column in (*self.columns, *self.optional):
            if path in self.names(column):
                return column
        if self.name == "swissai" and path in _SWISSAI:
            return path
        if self.name == "preference" and path in self.figures:
            return "figure"
        return None

    def visible(self, row: dict[str, Any]) -> dict[str, Any]:
        """Without the columns that the settings say not to read."""
        if not self.ignored:
            return row
        row = {name: cell for name, cell in row.items() if name not in self.ignored}
        if self.name == "swissai":  # of messages, read_messages leaves them out
            for path in self.ignored:
                row = _without(row, path.replace("[]", "").split("."))
        return row

    def check_columns(
        self, row: dict[str, Any], filled: Counter[str], *, for_training: bool = True
    ) -> None:
        """Count every column and message field that the row fills.

        filled: gets the counts, by path. for_training: if not, what goes with the answers is
        metadata, which the stage keeps.
        Errors: BadRow for one that is not read, and that would change what is said or trained.
        """
        refused = _OF_BOTH if for_training else OF_THE_PROMPT
        for name, cell in row.items():
            # Most cells are a text, and a call of says_something costs more than all else here.
            if not cell if type(cell) is str else not says_something(cell):
                continue
            filled[name] += 1
            if name in refused and not self._is_meant(name):
                raise BadRow(
                    "columns",
                    f"column {name} is not read, and it changes what is said or trained",
                    hint_of_column(name, self._mapping_with(name, row)),
                )
        if self.name == "swissai":
            self._check_swissai(row, filled, refused)
            return
        for column in self.columns.values():
            cell = row.get(column)
            if isinstance(cell, list):
                content = self.messages.content
                for index, item in enumerate(cell):
                    if isinstance(item, dict) and (
                        len(item) > 2 or isinstance(item.get(content), dict | list)
                    ):
                        self._check_message(item, column, index, filled)

    def _check_message(
        self, message: dict[str, Any], column: str, index: int, filled: Counter[str]
    ) -> None:
        names = self.messages
        for name, value in message.items():
            is_content = name == names.content
            if name == names.role or (is_content and isinstance(value, str)):
                continue
            if not says_something(value):  # most, where Arrow gives every message all fields
                continue
            path, key = f"{column}[].{name}", f"{column}[{index}].{name}"
            if not is_content:
                self._count([(path, key)], filled, OF_A_MESSAGE)
                if name == "tool_calls":
                    self._count(unread_below(value, OF_A_CALL, path, key), filled, frozenset())
            elif self._is_output(message) and is_structured(value):
                continue  # all of it is read
            elif isinstance(value, dict):
                self._count(unread_below(value, OF_A_CONTENT, path, key), filled, OF_A_MESSAGE)
            elif _are_texts(value):  # others are refused when they are read
                self._count(unread_below(value, OF_TEXT_PARTS, path, key), filled, OF_A_MESSAGE)

    def _is_output(self, message: dict[str, Any]) -> bool:
        given = message.get(self.messages.role)
        return isinstance(given, str) and (self.messages.roles | ROLES).get(given) == "tool"

    def _check_swissai(
        self, row: dict[str, Any], filled: Counter[str], refused: frozenset[str]
    ) -> None:
        """refused: of a branch, whose fields are as columns are, but for figures of its answer."""
        refused -= FIGURES_OF_A_BRANCH
        for column, shape in OF_SWISSAI.items():
            given = self.columns.get(column, column)
            for path, key in unread_below(row.get(given), shape, given, given):
                of_a_branch = path.count(".") == 1 and column == "conversation_branches"
                # A `content` that comes here as unread stands beside `parts`, and may say more.
                names = refused if of_a_branch else OF_A_MESSAGE | {"content"}
                self._count([(path, key)], filled, names)

    def _count(
        self, fields: Iterable[tuple[str, str]], filled: Counter[str], refused: frozenset[str]
    ) -> None:
        """fields: (path, key). Errors: BadRow for a name that is refused, and not meant."""
        for path, key in fields:
            filled[path] += 1
            if path.rpartition(".")[2] in refused and not self._is_meant(path):
                problem = f"{key} is not read, and it changes what is said or trained"
                raise BadRow("columns", problem, hint_of_field(path))

    def _is_meant(self, path: str) -> bool:
        return path in self.ignored or self.reads(path) is not None

    def _mapping_with(self, name: str, row: dict[str, Any]) -> str | None:
        """The `columns` that would read `name`, of this format."""
        for column in FORMATS[self.name][1]:
            if name in OPTIONAL[column] and column not in self.columns:
                # A preference whose prompt is in two columns, neither of which is read yet.
                if column == "input" and self.lacks_prompt(row):
                    return self.mapping_with(prompt=INSTRUCTION, input=name)
                return self.mapping_with(**{column: name})
        return None

    def mapping_with(self, **more: str) -> str:
        """The setting `columns` with these {its column: the file's} beside those that are read."""
        mapping = {**self.columns, **more}
        return f"{{{', '.join(f'{ours}: {given}' for ours, given in mapping.items())}}}"

    def lacks_prompt(self, row: dict[str, Any]) -> bool:
        """Whether a preference has an instruction, as alpaca does, and no column of its prompt."""
        return (
            self.name == "preference"
            and INSTRUCTION in row
            and not any(name in row for name in self.names("prompt"))
        )


def _are_texts(parts: Any) -> bool:
    return isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in parts
    )


def _without(value: Any, path: list[str]) -> Any:
    """A copy without the field at `path`, in each object of a list."""
    if isinstance(value, list):
        return [_without(item, path) for item in value]
    name, *below = path
    if not isinstance(value, dict) or name not in value:
        return value
    if not below:
        return {each: cell for each, cell in value.items() if each != name}
    return {**value, name: _without(value[name], below)}


def read_side(
    value: dict[str, Any],
    found: Format,
    name: str,
    role: Literal["user", "assistant"],
    tools: Tools = (),
) -> tuple[list[Entry], Tools]:
    """A prompt or an answer: a text, which is `role`'s, or a list of messages; and the tools that
    these declare. tools: those that the row does."""
    column = found.column(name, value)
    if column is None:
        raise BadRow("columns", f"no column for {name} is named in the settings")
    given = required(value, column)
    if isinstance(given, list):
        return read_messages(given, column, found.messages, tools)
    return [Entry(column, (Message(role, filled_text(given, column)),))], ()


def read_prompt(
    value: dict[str, Any], found: Format, name: str, tools: Tools = ()
) -> tuple[list[Entry], Tools]:
    """The input, if any, follows a prompt or an instruction after an empty line."""
    entries, declared = read_side(value, found, name, "user", tools)
    column = found.column("input", value)
    if column is None or value.get(column) is None or not text(value[column], column).strip():
        return entries, declared
    asked = found.column(name, value)
    if isinstance(value[asked], list):
        problem = f"{column}: has no place beside {asked}, a list of messages"
        raise BadRow("columns", problem)
    [(key, messages)] = entries
    whole = f"{messages[0].content}\n\n{value[column]}"
    return [Entry(key, (Message("user", whole),))], declared


def read_system(value: dict[str, Any], found: Format, entries: list[Entry]) -> list[Entry]:
    """The system message that stands in a column of its own, if any, before `entries`."""
    column = found.column("system", value)
    if column is None or value.get(column) is None or not text(value[column], column).strip():
        return []
    if entries and entries[0].messages[0].role == "system":
        if entries[0].messages[0].content.strip() == value[column].strip():
            return []  # said twice
        raise BadRow("roles", f"{column}: the messages have a system message of their own")
    return [Entry(column, (Message("system", value[column]),))]


def read_tools_column(value: dict[str, Any], found: Format) -> Tools:
    """The tools of the row's own column; none where it has none. Errors: BadRow."""
    column = found.column("tools", value)
    return read_tools(value.get(column), column) if column else ()


def tools_of(own: Tools, declared: Tools, found: Format) -> Tools:
    """own: of the row's column. declared: by its messages. Errors: BadRow where these differ."""
    if own and declared and own != declared:
        column = " or ".join(found.names("tools"))
        raise BadRow("columns", f"{column}: the messages declare other tools")
    return own or declared


@dataclass
class ColumnCounts:
    """num_rows: that were looked at. filled: how many rows have something in a column (`source`),
    or how many messages in a field (`messages[].name`). cleaned: how many rows cleaning left out,
    by reason."""

    num_rows: int = 0
    filled: Counter[str] = field(default_factory=Counter)
    cleaned: Counter[str] = field(default_factory=Counter)

    def take(self) -> "ColumnCounts":
        """What was counted since the last time."""
        taken = ColumnCounts(self.num_rows, self.filled, self.cleaned)
        self.num_rows, self.filled, self.cleaned = 0, Counter(), Counter()
        return taken


class ColumnReport:
    """What was read of the rows of each dataset, what was not, and how often.

    formats: what each dataset was recognised as. stage_reads: what the stage itself reads of the
    rows, {column or field by its own name: what it reads it as}.
    """

    def __init__(self, formats: Sequence[Format], stage_reads: Mapping[str, str] | None = None):
        self._formats = formats
        self._stage_reads = stage_reads or {}
        self._counts = [ColumnCounts() for _ in formats]

    def add(self, dataset: int, counts: ColumnCounts) -> None:
        self._counts[dataset].num_rows += counts.num_rows
        self._counts[dataset].filled.update(counts.filled)
        self._counts[dataset].cleaned.update(counts.cleaned)

    def record(self, dataset: int) -> dict[str, Any]:
        """{num_source_rows, columns}: of each column its name, what it was read as (null: it was
        not read), and the number of rows that fill it. And num_cleaned, where cleaning left rows
        out: their number by reason."""
        found, counts = self._formats[dataset], self._counts[dataset]
        # What the settings ignore and no row has is listed too: it may be misspelt.
        columns = [
            {"name": name, "read_as": self._read_as(found, name), "number": counts.filled[name]}
            for name in sorted(counts.filled.keys() | found.ignored)
        ]
        cleaned = {"num_cleaned": dict(sorted(counts.cleaned.items()))} if counts.cleaned else {}
        return {"num_source_rows": counts.num_rows, "columns": columns, **cleaned}

    def sources(self, num_rows: Sequence[int]) -> list[dict[str, Any]]:
        """Of each dataset: what its rows were read as, and its record. num_rows: the good ones."""
        return [
            {"read_as": found.describe(), "num_rows": number, **self.record(index)}
            for index, (found, number) in enumerate(zip(self._formats, num_rows, strict=True))
        ]

    def _read_as(self, found: Format, name: str) -> str | None:
        if name in found.ignored:
            return None
        column, dots, below = name.partition("[].")
        own = next((own for own, given in found.columns.items() if given == column), column)
        return found.reads(name) or self._stage_reads.get(f"{own}{dots}{below}")


def describe_columns(source: dict[str, Any], *, unread: str = "not read") -> Iterator[str]:
    """Of a source's record, in a few lines for a person: what cleaning left out, what is read
    beside the columns that make up the format, and what is not. unread: what to call that."""
    if cleaned := source.get("num_cleaned"):
        words = ", ".join(f"{number:,} {reason}" for reason, number in cleaned.items())
        yield f"{source['name']}: left out: {words}"
    columns = source.get("columns", [])  # records of older versions have none
    beside = [each for each in columns if each["read_as"] not in (None, *_NEEDED)]
    others = [each for each in columns if each["read_as"] is None]
    for what, some in (("also read", beside), (unread, others)):
        if some:
            words = ", ".join(map(_described, some[:_MOST_COLUMNS]))
            more = f" and {len(some) - _MOST_COLUMNS} more" if len(some) > _MOST_COLUMNS else ""
            yield f"{source['name']}: {what}: {words}{more}"


def describe_source_rows(source: dict[str, Any], num_good: int) -> str:
    """` (80 were read)`, where that is another number than the good ones."""
    num_read = source.get("num_source_rows", num_good)
    return "" if num_read == num_good else f" ({num_read:,} were read)"


def _described(column: dict[str, Any]) -> str:
    """`system_prompt as system (12)`."""
    name, read_as = column["name"], column["read_as"]
    renamed = read_as not in (None, "figure") and read_as != name.rpartition("[].")[2]
    return f"{name}{f' as {read_as}' if renamed else ''} ({column['number']:,})"
