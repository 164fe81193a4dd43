"""How long the sequences of a prepared dataset are, by source, and how much of them is trained.

A sequence has its whole length. What is trained on are its pieces (sequences.py): one that was cut
counts with the tokens that are used, one that is used twice counts twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from jaxtyping import Bool, Int64, Integer

from post_training.data.prepared.dataset import PreparedDataset, SequenceStore
from post_training.data.rows import COMPLETION

_TOKENS_AT_ONCE = 1 << 22
# How they are shown on a terminal.
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLUMNS = (
    *("sequences", "tokens", "trained", "mean", "median", "p95", "p99", "longest"),
    "generation ratio",
)


@dataclass(frozen=True)
class PieceTable:
    """Of every piece, in the order of the rows: its row, source and sequence (from 0; the sequence
    within its source); tokens and trained tokens of the piece; length and num_prompt of the
    whole sequence, the latter its tokens before the first COMPLETION.

    is_first: of the pieces of one use of a sequence.
    """

    row: Int64[np.ndarray, " pieces"]
    source: Int64[np.ndarray, " pieces"]
    sequence: Int64[np.ndarray, " pieces"]
    num_tokens: Int64[np.ndarray, " pieces"]
    num_trained: Int64[np.ndarray, " pieces"]
    length: Int64[np.ndarray, " pieces"]
    num_prompt: Int64[np.ndarray, " pieces"]
    is_first: Bool[np.ndarray, " pieces"]


@dataclass(frozen=True)
class LengthSummary:
    """The lengths of a source's sequences.

    num_sequences: one that is used twice counts twice. num_tokens, num_trained_tokens: of the
    pieces. mean to longest: of whole lengths. generation_ratio: completion tokens over prompt
    tokens of whole sequences, as in prepared.json; None without any prompt.
    """

    name: str
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    mean: float
    median: int
    p95: int
    p99: int
    longest: int
    generation_ratio: float | None


@dataclass(frozen=True)
class Bin:
    """Sequences of a length from `start` to before `end`."""

    start: int
    end: int
    num_sequences: int


def source_starts(dataset: PreparedDataset) -> Int64[np.ndarray, " bounds"]:
    """The first sequence of each source, numbered through all; then their number."""
    sources = dataset.record["sources"]
    if len(dataset.stores) == len(sources):
        return np.cumsum([0, *(len(store) for store in dataset.stores)])
    return np.cumsum([0, *(source["num_rows"] for source in sources)])


def build_piece_table(dataset: PreparedDataset) -> PieceTable:
    """The table of a dataset; reads the kinds of every token, some megabytes at a time."""
    pieces = np.asarray(dataset.pieces)
    numbers, starts, num_tokens = pieces.T
    num_trained, length, num_prompt = np.zeros((3, len(pieces)), np.int64)
    order = np.argsort(numbers, kind="stable")
    for block, own_numbers in _blocks(dataset, np.unique(numbers)):
        bounds = np.searchsorted(numbers, [own_numbers[0], own_numbers[-1] + 1], sorter=order)
        own = order[slice(*bounds)]
        index = np.searchsorted(own_numbers, numbers[own])
        num_trained[own] = block.num_trained(index, starts[own], num_tokens[own])
        length[own] = np.diff(block.starts)[index]
        num_prompt[own] = block.num_prompt()[index]
    first_of_source = source_starts(dataset)
    source = np.searchsorted(first_of_source, numbers, side="right") - 1
    lowest = np.full(first_of_source[-1], np.iinfo(np.int64).max)
    np.minimum.at(lowest, numbers, starts)
    return PieceTable(
        row=np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets)),
        source=source,
        sequence=numbers - first_of_source[source],
        num_tokens=num_tokens,
        num_trained=num_trained,
        length=length,
        num_prompt=num_prompt,
        is_first=starts == lowest[numbers],
    )


def summarise_lengths(table: PieceTable, names: Sequence[str]) -> list[LengthSummary]:
    """The lengths of each source that is used, then of all when there are several."""
    chosen = [(name, table.source == source) for source, name in enumerate(names)]
    if len(names) > 1:
        chosen.append(("all", np.ones(len(table.source), bool)))
    return [_summarise(table, own, name) for name, own in chosen if own.any()]


def histogram(lengths: Integer[np.ndarray, " S"]) -> list[Bin]:
    """From the shortest to the longest, two bins for each doubling of the length."""
    last = int(np.ceil(2 * np.log2(lengths.max() + 1)))
    edges = np.unique(np.rint(2 ** (np.arange(last + 1) / 2)).astype(np.int64))
    if lengths.min() == 0:  # documents of other tools may be empty
        edges = np.concatenate([[0], edges])
    counts, _ = np.histogram(lengths, edges)
    used = np.flatnonzero(counts)
    return [
        Bin(int(edges[bin_]), int(edges[bin_ + 1]), int(counts[bin_]))
        for bin_ in range(used[0], used[-1] + 1)
    ]


def write_per_sample(table: PieceTable, names: Sequence[str], file: TextIO) -> None:
    """A line for each piece, separated by tabs; rows and sequences count from 1."""
    columns = ("row", "source", "sequence", "length", "tokens", "trained")
    print(*columns, sep="\t", file=file)
    values = (
        table.row + 1,
        table.source,
        table.sequence + 1,
        table.length,
        table.num_tokens,
        table.num_trained,
    )
    for row, source, *others in zip(*(column.tolist() for column in values), strict=True):
        print(row, names[source], *others, sep="\t", file=file)


def _summarise(table: PieceTable, own: Bool[np.ndarray, " pieces"], name: str) -> LengthSummary:
    once = own & table.is_first
    lengths = table.length[once]
    num_prompt = int(table.num_prompt[once].sum())
    # Lengths that occur, not values between them.
    median, p95, p99 = np.percentile(lengths, [50, 95, 99], method="inverted_cdf").tolist()
    return LengthSummary(
        name=name,
        num_sequences=len(lengths),
        num_tokens=int(table.num_tokens[own].sum()),
        num_trained_tokens=int(table.num_trained[own].sum()),
        mean=round(float(lengths.mean()), 1),
        median=int(median),
        p95=int(p95),
        p99=int(p99),
        longest=int(lengths.max()),
        generation_ratio=round(int(lengths.sum()) / num_prompt - 1, 4) if num_prompt else None,
    )


@dataclass(frozen=True)
class _Block:
    """Sequences one after another. starts: of each, in tokens; then their end.
    num_before: COMPLETION tokens before each token, and before the end."""

    starts: Int64[np.ndarray, " bounds"]
    num_before: Int64[np.ndarray, " tokens"]

    def num_trained(
        self,
        index: Int64[np.ndarray, " N"],
        start: Int64[np.ndarray, " N"],
        length: Int64[np.ndarray, " N"],
    ) -> Int64[np.ndarray, " N"]:
        """Of pieces of sequences `index`; the first token of a piece is never predicted."""
        first = self.starts[index] + start
        end = first + length
        return self.num_before[end] - self.num_before[np.minimum(first + 1, end)]

    def num_prompt(self) -> Int64[np.ndarray, " S"]:
        """Of each sequence, the tokens before its first COMPLETION, or all."""
        starts, ends = self.starts[:-1], self.starts[1:]
        # The last position with as many before it as the sequence's first.
        found = np.searchsorted(self.num_before, self.num_before[starts], side="right") - 1
        return np.minimum(found, ends) - starts


def _blocks(
    dataset: PreparedDataset, numbers: Int64[np.ndarray, " S"]
) -> Iterator[tuple[_Block, Int64[np.ndarray, " own"]]]:
    """The sequences of these numbers, ascending, in blocks of one store each; their numbers."""
    first = 0
    for store in dataset.stores:
        own = numbers[(numbers >= first) & (numbers < first + len(store))]
        num_tokens = np.cumsum(store.tokens.lengths[own - first], dtype=np.int64)
        breaks = np.flatnonzero(np.diff(num_tokens // _TOKENS_AT_ONCE)) + 1
        for part in np.split(own, breaks):
            if len(part):
                yield _read_block(store, part - first), part
        first += len(store)


def _read_block(store: SequenceStore, sequences: Int64[np.ndarray, " S"]) -> _Block:
    lengths = store.tokens.lengths[sequences]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if store.kinds is None:
        return _Block(starts, np.arange(starts[-1] + 1))
    kinds = np.concatenate(store.kinds.read_many(sequences.tolist()))
    num_before = np.zeros(len(kinds) + 1, np.int64)
    np.cumsum(kinds == COMPLETION, out=num_before[1:])
    return _Block(starts, num_before)


def table_lines(summaries: Sequence[LengthSummary]) -> Iterator[str]:
    """A table of the sources for a terminal; numbers are aligned below their titles."""
    return aligned_lines([("source", *_COLUMNS), *((e.name, *_values(e)) for e in summaries)])


def aligned_lines(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table whose first column has names, and the others numbers."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *numbers in cells:
        aligned = (f"{text:>{width}}" for text, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([f"{name:{widths[0]}}", *aligned])


def histogram_lines(bins: Sequence[Bin], what: str) -> Iterator[str]:
    """The lengths as bars. what: sequences or pairs."""
    yield f"{what} by length, in tokens"
    most = max(each.num_sequences for each in bins)
    lengths = [f"{each.start:,} to {each.end - 1:,}" for each in bins]
    width = max(map(len, lengths))
    count_width = len(f"{most:,}")
    for text, each in zip(lengths, bins, strict=True):
        bar = _bar(each.num_sequences / most)
        yield f"{text:>{width}}  {each.num_sequences:{count_width},}  {bar}".rstrip()


def _values(summary: LengthSummary) -> Iterator[str]:
    yield f"{summary.num_sequences:,}"
    yield f"{summary.num_tokens:,}"
    yield f"{summary.num_trained_tokens:,}"
    yield f"{summary.mean:,.1f}"
    for length in (summary.median, summary.p95, summary.p99, summary.longest):
        yield f"{length:,}"
    yield "-" if summary.generation_ratio is None else f"{summary.generation_ratio:.3f}"


def _bar(share: float) -> str:
    """At least an eighth where there is anything."""
    eighths = max(round(share * _BAR_WIDTH * 8), 1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
