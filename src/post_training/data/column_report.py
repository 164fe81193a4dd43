"""What was read of each dataset's rows, and what was not: counts for the log and the record.

    Reader.values counts a chunk's rows (ColumnCounts) -> read_chunks adds them up, in order
    -> ColumnReport: each column and message field with what it was read as, and how often

The counts are of all rows that were looked at, bad ones too; they don't depend on the workers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.data.config import FORMATS
from post_training.data.formats.columns import Format

_NEEDED = tuple({name for needed, _ in FORMATS.values() for name in needed})
_MOST_COLUMNS = 12  # of a line; the record has all


@dataclass
class ColumnCounts:
    """num_rows: of the source. filled: how many rows (or messages) have something in `source`, or
    in `messages[].name`."""

    num_rows: int = 0
    filled: Counter[str] = field(default_factory=Counter)

    def take(self) -> "ColumnCounts":
        """What was counted since the last time."""
        taken = ColumnCounts(self.num_rows, self.filled)
        self.num_rows, self.filled = 0, Counter()
        return taken


class ColumnReport:
    """By dataset. formats: what each was recognised as. stage_reads: what the stage itself reads of
    the rows, {column or field by its own name: what it reads it as}."""

    def __init__(self, formats: Sequence[Format], stage_reads: Mapping[str, str] | None = None):
        self._formats = formats
        self._stage_reads = stage_reads or {}
        self._counts = [ColumnCounts() for _ in formats]

    def add(self, dataset: int, counts: ColumnCounts) -> None:
        self._counts[dataset].num_rows += counts.num_rows
        self._counts[dataset].filled.update(counts.filled)

    def record(self, dataset: int) -> dict[str, Any]:
        """num_source_rows, and each column's name, what it was read as (null: it was not), and
        number."""
        found, counts = self._formats[dataset], self._counts[dataset]
        # What the settings ignore and no row has is told too: it may be misspelt.
        columns = [
            {"name": name, "read_as": self._read_as(found, name), "number": counts.filled[name]}
            for name in sorted(counts.filled.keys() | found.ignored)
        ]
        return {"num_source_rows": counts.num_rows, "columns": columns}

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


def described_columns(source: dict[str, Any], *, unread: str = "not read") -> Iterator[str]:
    """Of a source's record, in a line or two for a person: what is read beside the columns that
    make up the format, and what is not. unread: what to call that."""
    columns = source.get("columns", [])  # records of older versions have none
    beside = [each for each in columns if each["read_as"] not in (None, *_NEEDED)]
    others = [each for each in columns if each["read_as"] is None]
    for what, some in (("also read", beside), (unread, others)):
        if some:
            words = ", ".join(map(_described, some[:_MOST_COLUMNS]))
            more = f" and {len(some) - _MOST_COLUMNS} more" if len(some) > _MOST_COLUMNS else ""
            yield f"{source['name']}: {what}: {words}{more}"


def described_source_rows(source: dict[str, Any], num_good: int) -> str:
    """` (80 were read)`, where that is another number than the good ones."""
    num_read = source.get("num_source_rows", num_good)
    return "" if num_read == num_good else f" ({num_read:,} were read)"


def _described(column: dict[str, Any]) -> str:
    """`system_prompt as system (12)`."""
    name, read_as = column["name"], column["read_as"]
    renamed = read_as not in (None, "figure") and read_as != name.rpartition("[].")[2]
    return f"{name}{f' as {read_as}' if renamed else ''} ({column['number']:,})"
