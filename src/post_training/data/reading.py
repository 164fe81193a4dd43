"""Every row of every dataset, in order: opened, recognised, transformed and parsed.

record -> transform -> values (JSON objects) -> parse -> rows of its format
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

from post_training.core.errors import PostTrainingError
from post_training.data.config import DatasetConfig, SourcesConfig
from post_training.data.formats.columns import Format
from post_training.data.formats.parse import parse
from post_training.data.formats.recognise import recognise
from post_training.data.rows import BadRow, Place, Record, Row
from post_training.data.sources import Chunk, Source
from post_training.data.sources.open import open_source
from post_training.data.transforms import find_transform
from post_training.data.workers import ordered_map

# Of a transform: many enough that its process is not waited for at each.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Reader:
    """Reads the rows of all datasets, by their index, in any process.

    formats: what each dataset was recognised as.
    """

    config: SourcesConfig
    formats: tuple[Format, ...]
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    train_on_thoughts: bool = True

    def records(self, chunk: Chunk, dataset: int) -> Iterator[Record]:
        """Those of the chunk, some at a time through the dataset's transform."""
        name = self.config.datasets[dataset].transform
        if name is None:
            yield from chunk.records()
            return
        records = chunk.records()
        while some := list(islice(records, _ROWS_AT_ONCE)):
            yield from _transformed(some, name, self.config)

    def values(self, record: Record, dataset: int) -> list[dict[str, Any]]:
        """The objects that a record is after its dataset's transform. Errors: BadRow."""
        return _values(record, self.config, self.config.datasets[dataset])

    def parse(self, value: dict[str, Any], dataset: int) -> list[Row]:
        """Errors: BadRow."""
        return parse(
            value,
            self.formats[dataset],
            train_on=self.train_on,
            train_on_thoughts=self.train_on_thoughts,
        )


@dataclass(frozen=True)
class Rejected:
    place: Place
    bad: BadRow
    raw: bytes


class ReadChunk(Protocol):
    """What a worker made of a chunk of dataset number `dataset`."""

    dataset: int
    rejected: list[Rejected]


State = TypeVar("State")
Output = TypeVar("Output", bound=ReadChunk)


def open_sources(config: SourcesConfig) -> tuple[list[Source], tuple[Format, ...]]:
    """Every dataset's source, and what its first good row is recognised as.

    Errors: UsageError where a source is not there, or its format is unknown or ambiguous.
    """
    sources = [open_source(dataset, config.hub_dir) for dataset in config.datasets]
    formats = tuple(
        _recognised(source, config, dataset)
        for source, dataset in zip(sources, config.datasets, strict=True)
    )
    return sources, formats


def name_of(dataset: DatasetConfig) -> str:
    """As it is called in records and on the screen."""
    if dataset.name is not None:
        return dataset.name
    if dataset.path is not None:
        return dataset.path.name
    return "/".join(filter(None, (dataset.hub, dataset.subset, dataset.split)))


def read_chunks(
    function: Callable[[State, tuple[int, Chunk]], Output],
    state: State,
    sources: Sequence[Source],
    config: SourcesConfig,
    num_rows_read: Callable[[int], int],
) -> Iterator[Output]:
    """`function(state, (dataset, chunk))` of every chunk, in order, by `config.num_workers`.

    num_rows_read: of a dataset, so far; under debug_subsample its chunks end once they suffice.
    """
    enough = config.debug_subsample

    def suffices(dataset: int) -> bool:
        return enough is not None and num_rows_read(dataset) >= enough

    def chunks() -> Iterator[tuple[int, Chunk]]:
        for dataset, source in enumerate(sources):
            for chunk in source.chunks():
                if suffices(dataset):
                    break
                yield dataset, chunk

    for output in ordered_map(function, state, chunks(), num_workers=config.num_workers):
        # Workers are ahead of what was counted; what they did too much must not show.
        if not suffices(output.dataset):
            yield output


def _transformed(records: list[Record], name: str, config: SourcesConfig) -> list[Record]:
    good = [record for record in records if not isinstance(record.value, BadRow)]
    transform = find_transform(name, config.transforms, config.function_limits)
    made = transform([record.value for record in good], lambda row: str(good[row].place))
    return [
        record if isinstance(record.value, BadRow) else replace(record, transformed=next(made))
        for record in records
    ]


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


def _recognised(source: Source, config: SourcesConfig, dataset: DatasetConfig) -> Format:
    """By the first good row; bad ones before it get their verdicts when they are read."""
    first: tuple[Place, BadRow] | None = None
    for chunk in source.chunks():
        for record in chunk.records():
            try:
                value = _values(record, config, dataset)[0]
                return recognise(value, dataset, str(record.place))
            except BadRow as bad:
                first = first or (record.place, bad)
    if first is None:
        raise PostTrainingError("no rows", where=name_of(dataset))
    place, bad = first
    raise PostTrainingError(f"{bad.problem}; and there is not one good row", where=str(place))
