"""Every row of every dataset, in order: opened, recognised, transformed, checked and parsed.

    open_sources   a source and a format for each dataset
    read_chunks    what a function of the caller's makes of every chunk, in several processes
    Reader         in such a process: record -> transform -> values (JSON objects) -> parse -> rows
    Verdicts       in ours: what becomes of a bad row, and how many there were

Each value is checked before it is parsed: what it fills is counted, and what would be left out
though it changes the row's meaning is refused (formats/unread.py).
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from post_training.core.errors import PostTrainingError
from post_training.data.config import DatasetConfig, SourcesConfig
from post_training.data.formats.columns import ColumnCounts, ColumnReport, Format
from post_training.data.formats.recognise import check_same, parse, recognise
from post_training.data.rows import REASONS, BadRow, Place, Record, Row
from post_training.data.sources import Chunk, Source
from post_training.data.sources.open import open_source
from post_training.data.transforms import find_transform
from post_training.data.user_functions import end_functions
from post_training.data.workers import ordered_map

if TYPE_CHECKING:  # It needs numpy and xxhash, which a login node hasn't.
    from post_training.data.cleaning.cleaning import Cleaning

# Rows that a setting asks to leave out (overlong: drop, a transform that returns None, …): these
# never end the work.
MEANT = ("too-long", "filtered", "truncated", "near-duplicate", "contaminated")


def open_sources(
    config: SourcesConfig, *, for_training: bool = True
) -> tuple[list[Source], tuple[Format, ...]]:
    """Every dataset's source, and what its first good row is recognised as.

    for_training: see Reader.
    Errors: UsageError where a source is not there, or its format is unknown or ambiguous.
    """
    sources = [open_source(dataset, config.hub_dir) for dataset in config.datasets]
    formats = tuple(
        _recognised(source, config, dataset, for_training)
        for source, dataset in zip(sources, config.datasets, strict=True)
    )
    return sources, formats


def name_of(dataset: DatasetConfig) -> str:
    """What a dataset is called in records and on the screen."""
    if dataset.name is not None:
        return dataset.name
    if dataset.path is not None:
        return dataset.path.name
    return "/".join(filter(None, (dataset.hub, dataset.subset, dataset.split)))


@dataclass(frozen=True)
class Rejected:
    """A bad record. raw: its bytes, for the rejects file."""

    place: Place
    bad: BadRow
    raw: bytes


@dataclass(frozen=True)
class Reader:
    """Reads the rows of all datasets, by their index, in any process.

    formats: what each dataset was recognised as. train_on, train_on_thoughts: as in DataConfig.
    for_training: if not, what goes with an answer (a label, a weight) is metadata, and kept.
    cleaning: what else is left out (cleaning/cleaning.py). counts: of this process's rows, since
    the last `take`.
    """

    config: SourcesConfig
    formats: tuple[Format, ...]
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    train_on_thoughts: bool = True
    for_training: bool = True
    cleaning: "Cleaning | None" = None
    counts: ColumnCounts = field(default_factory=ColumnCounts, compare=False)

    def rows(
        self, chunk: Chunk, dataset: int, rejected: list[Rejected]
    ) -> Iterator[tuple[Record, Row]]:
        """Every row of the chunk with the record it comes from. rejected: gets the bad records."""
        for record in self.records(chunk, dataset):
            try:
                for value in self.values(record, dataset):
                    for row in self.parse(value, dataset):
                        yield record, row
            except BadRow as bad:
                rejected.append(Rejected(record.place, bad, record.raw))

    def records(self, chunk: Chunk, dataset: int) -> Iterator[Record]:
        """The chunk's records, through the dataset's transform where it has one."""
        name = self.config.datasets[dataset].transform
        if name is None:
            return chunk.records()
        return _transformed(list(chunk.records()), name, self.config)

    def values(self, record: Record, dataset: int) -> list[dict[str, Any]]:
        """The objects that a record is after its dataset's transform. Errors: BadRow."""
        self.counts.num_rows += 1
        settings, found = self.config.datasets[dataset], self.formats[dataset]
        values = _values(record, self.config, settings)
        for value in values:
            check_same(value, found, settings)
            found.check_columns(value, self.counts.filled, for_training=self.for_training)
        if self.cleaning is not None:
            try:
                self.cleaning.check(record.place, values, dataset, found)
            except BadRow as bad:
                self.counts.cleaned[bad.reason] += 1
                raise
        return values

    def parse(self, value: dict[str, Any], dataset: int) -> list[Row]:
        """The rows that a value is. Errors: BadRow."""
        return parse(
            value,
            self.formats[dataset],
            train_on=self.train_on,
            train_on_thoughts=self.train_on_thoughts,
        )


class ReadChunk(Protocol):
    """What a worker made of a chunk of dataset number `dataset`."""

    dataset: int
    rejected: list[Rejected]


class HasReader(Protocol):
    """What a worker needs to read a chunk."""

    @property
    def reader(self) -> Reader: ...


State = TypeVar("State", bound=HasReader)
Output = TypeVar("Output", bound=ReadChunk)


def read_chunks(
    function: Callable[[State, tuple[int, Chunk]], Output],
    state: State,
    sources: Sequence[Source],
    config: SourcesConfig,
    num_rows_read: Callable[[int], int],
    report: ColumnReport,
) -> Iterator[Output]:
    """`function(state, (dataset, chunk))` of every chunk, in order, by `config.num_workers`.

    num_rows_read: of a dataset, so far; under debug_subsample its chunks end once they suffice.
    report: to which the columns of each chunk are added.
    """
    enough = config.debug_subsample

    def has_enough(dataset: int) -> bool:
        return enough is not None and num_rows_read(dataset) >= enough

    def chunks() -> Iterator[tuple[int, Chunk]]:
        for dataset, source in enumerate(sources):
            for chunk in source.chunks():
                if has_enough(dataset):
                    break
                yield dataset, chunk

    outputs = ordered_map(
        _run_and_count, (function, state), chunks(), num_workers=config.num_workers
    )
    try:
        for output, counts in outputs:
            # Workers run ahead: a chunk that is no longer needed must show neither in the counts
            # nor among the rejected rows, or both would depend on the number of workers.
            if not has_enough(output.dataset):
                report.add(output.dataset, counts)
                yield output
    finally:
        end_functions()  # Else the process of a transform would live as long as a training run.


class Verdicts:
    """What becomes of bad rows, and how many there were of each reason; a context manager.

    on_error: fail: the first one ends the work. skip: it is left out. quarantine: and is kept in
    the file `rejects_path`, a JSON object a line: file, line, byte, reason, problem, a hint where a
    setting decides, and the row itself as `raw` (`raw_base64` where it is not UTF-8), so that it
    can be mended and read again.
    """

    def __init__(self, on_error: Literal["fail", "skip", "quarantine"], rejects_path: Path):
        self.on_error = on_error
        self.counts: dict[str, int] = {}
        self._path = rejects_path
        self._file: IO[str] | None = None

    def __enter__(self) -> "Verdicts":
        if self.on_error == "quarantine":
            self._file = open(self._path, "w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def reject(self, place: Place, bad: BadRow, raw: bytes) -> None:
        """Count a bad row, and keep it under `quarantine`.

        Errors: PostTrainingError under `fail`, unless a setting asks to leave such rows out.
        """
        if is_fatal(bad, self.on_error):
            raise refusal(place, bad)
        self.count(bad.reason)
        if self._file is not None:
            self._file.write(json.dumps(_entry(place, bad, raw), ensure_ascii=False) + "\n")

    def count(self, reason: str, number: int = 1) -> None:
        assert reason in REASONS
        if number:
            self.counts[reason] = self.counts.get(reason, 0) + number

    def summary(self) -> str:
        """`3 rows left out: 2 malformed, 1 empty`, or nothing."""
        if not self.counts:
            return ""
        total = sum(self.counts.values())
        return f"{total:,} row{'s' if total > 1 else ''} left out: {describe_counts(self.counts)}"

    def nothing_left(self, what: str) -> PostTrainingError:
        """The error where no row is left to be made a `what`."""
        hint = None
        if "truncated" in self.counts:
            hint = "an answer was cut off, here or when it was sampled (sampling.max_tokens): "
            hint += "set truncated_completions: train, or sample and allow longer ones"
        problem = f"no {what} to train on: {self.summary() or 'there is none'}"
        return PostTrainingError(problem, hint=hint)


def describe_counts(counts: dict[str, int]) -> str:
    """`2 malformed, 1 truncated (truncated_completions: drop)`."""
    settings = {"truncated": " (truncated_completions: drop)"}
    return ", ".join(f"{n:,} {reason}{settings.get(reason, '')}" for reason, n in counts.items())


def is_fatal(bad: BadRow, on_error: str) -> bool:
    """Whether the row ends the work."""
    return on_error == "fail" and bad.reason not in MEANT


def refusal(place: Place, bad: BadRow) -> PostTrainingError:
    """The error of a row that ends the work."""
    how = f"{bad.hint};" if bad.hint else "mend the row,"
    hint = f"{how} or leave bad rows out: on_error: skip, or quarantine"
    return PostTrainingError(bad.problem, where=str(place), hint=hint)


def _entry(place: Place, bad: BadRow, raw: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"file": place.path, "line": place.number, "byte": place.byte}
    entry |= {"reason": bad.reason, "problem": bad.problem}
    if bad.hint is not None:
        entry["hint"] = bad.hint
    try:
        return entry | {"raw": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return entry | {"raw_base64": base64.b64encode(raw).decode()}


def _run_and_count(
    work: tuple[Callable[[Any, tuple[int, Chunk]], Output], HasReader], item: tuple[int, Chunk]
) -> tuple[Output, ColumnCounts]:
    function, state = work
    output = function(state, item)
    return output, state.reader.counts.take()


def _transformed(records: list[Record], name: str, config: SourcesConfig) -> Iterator[Record]:
    good = [record for record in records if not isinstance(record.value, BadRow)]
    transform = find_transform(name, config.transforms, config.function_limits)
    made = transform([record.value for record in good], lambda row: str(good[row].place))
    for record in records:
        if isinstance(record.value, BadRow):
            yield record
        else:
            yield replace(record, transformed=next(made))


def _values(record: Record, config: SourcesConfig, dataset: DatasetConfig) -> list[dict[str, Any]]:
    if isinstance(record.value, BadRow):
        raise record.value
    if dataset.transform is None:
        return [record.value]
    if record.transformed is None:
        [record] = _transformed([record], dataset.transform, config)
    values = record.transformed
    if isinstance(values, BadRow):
        raise values
    if not values:
        raise BadRow("filtered", f"transform {dataset.transform} left it out")
    return values


def _recognised(
    source: Source, config: SourcesConfig, dataset: DatasetConfig, for_training: bool
) -> Format:
    """By the first good row; bad ones before it get their verdicts when they are read.

    What would end the work then ends it now, before a large file is read to its end in search of
    a good row.
    """
    first: tuple[Place, BadRow] | None = None
    for chunk in source.chunks():
        for record in chunk.records():
            try:
                value = _values(record, config, dataset)[0]
                found = recognise(value, dataset, str(record.place), for_training=for_training)
                found.check_columns(value, Counter(), for_training=for_training)
                return found
            except BadRow as bad:
                if is_fatal(bad, config.on_error):
                    raise refusal(record.place, bad) from None
                first = first or (record.place, bad)
    if first is None:
        raise PostTrainingError("no rows", where=name_of(dataset))
    place, bad = first
    problem = f"{bad.problem}; and there is not one good row"
    raise PostTrainingError(problem, where=str(place), hint=bad.hint)
