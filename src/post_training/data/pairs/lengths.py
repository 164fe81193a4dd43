"""How long the pairs of a prepared dataset are, by source: prompts, answers, which is longer.

A pair that is used twice counts twice. Lengths are of what is left within the limits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from jaxtyping import Int64

from post_training.data.lengths import aligned_lines
from post_training.data.pairs.dataset import (
    CHOSEN,
    CUT,
    PREFIX,
    REF_LOGPROB,
    REJECTED,
    SOURCE,
    PairDataset,
)
from post_training.data.rows import COMPLETION

_COLUMNS = (
    *("pairs", "tokens", "trained", "prompt", "chosen", "rejected", "chosen longer"),
    *("p95", "longest", "cut", "with reference"),
)


@dataclass(frozen=True)
class PairTable:
    """Of every pair in the rows, in order: its row and source (from 0), its number within the
    source, its tokens as it lies in the row, and those that are trained; the tokens of the prompt
    and of both answers."""

    row: Int64[np.ndarray, " N"]
    source: Int64[np.ndarray, " N"]
    number: Int64[np.ndarray, " N"]
    num_tokens: Int64[np.ndarray, " N"]
    num_trained: Int64[np.ndarray, " N"]
    prompt: Int64[np.ndarray, " N"]
    chosen: Int64[np.ndarray, " N"]
    rejected: Int64[np.ndarray, " N"]
    is_cut: Int64[np.ndarray, " N"]
    has_reference: Int64[np.ndarray, " N"]

    @property
    def longest(self) -> Int64[np.ndarray, " N"]:
        """Tokens of the prompt with the longer answer."""
        return self.prompt + np.maximum(self.chosen, self.rejected)


@dataclass(frozen=True)
class PairSummary:
    """The pairs of a source. prompt, chosen, rejected: mean tokens. chosen_longer: share of the
    pairs whose chosen answer has more tokens. p95, longest: of a prompt with its longer answer.
    num_cut: pairs that a limit cut. num_with_reference: those with reference logprobs."""

    name: str
    num_pairs: int
    num_tokens: int
    num_trained_tokens: int
    prompt: float
    chosen: float
    rejected: float
    chosen_longer: float
    p95: int
    longest: int
    num_cut: int
    num_with_reference: int


def first_of_sources(dataset: PairDataset) -> Int64[np.ndarray, " S"]:
    """The number of the first pair of each source, all numbered together."""
    return np.searchsorted(dataset.pairs[:, SOURCE], np.arange(len(dataset.source_names)))


def build_pair_table(dataset: PairDataset) -> PairTable:
    """The table of a dataset; reads the kinds of every token, pair by pair."""
    numbers = dataset.numbers
    entries = np.asarray(dataset.pairs)[numbers]
    num_trained = np.zeros(dataset.num_pairs, np.int64)
    for number in dataset.used_pairs().tolist():
        pair = dataset.read_pair(number)
        # Without a prompt, nothing predicts the first token of an answer.
        first = 0 if len(pair.prefix) else 1
        num_trained[number] = sum(
            int((answer.kinds[first:] == COMPLETION).sum())
            for answer in (pair.chosen, pair.rejected)
        )
    references = np.asarray(dataset.figures)[numbers][:, :, REF_LOGPROB]
    return PairTable(
        row=np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets)),
        source=entries[:, SOURCE],
        number=numbers - first_of_sources(dataset)[entries[:, SOURCE]],
        num_tokens=dataset.lengths_in_rows,
        num_trained=num_trained[numbers],
        prompt=entries[:, PREFIX],
        chosen=entries[:, CHOSEN],
        rejected=entries[:, REJECTED],
        is_cut=(entries[:, CUT] != 0).astype(np.int64),
        has_reference=(~np.isnan(references).any(1)).astype(np.int64),
    )


def summarise_pairs(table: PairTable, names: Sequence[str]) -> list[PairSummary]:
    """The pairs of each source that is used, then of all when there are several."""
    chosen = [(name, table.source == source) for source, name in enumerate(names)]
    if len(names) > 1:
        chosen.append(("all", np.ones(len(table.source), bool)))
    return [_summarise(table, own, name) for name, own in chosen if own.any()]


def _summarise(table: PairTable, own: np.ndarray, name: str) -> PairSummary:
    longest = table.longest[own]
    means = (
        round(float(each[own].mean()), 1) for each in (table.prompt, table.chosen, table.rejected)
    )
    return PairSummary(
        name,
        int(own.sum()),
        int(table.num_tokens[own].sum()),
        int(table.num_trained[own].sum()),
        *means,
        chosen_longer=round(float((table.chosen > table.rejected)[own].mean()), 4),
        p95=int(np.percentile(longest, 95, method="inverted_cdf")),
        longest=int(longest.max()),
        num_cut=int(table.is_cut[own].sum()),
        num_with_reference=int(table.has_reference[own].sum()),
    )


def pair_table_lines(summaries: Sequence[PairSummary]) -> Iterator[str]:
    """A table of the sources for a terminal."""
    return aligned_lines([("source", *_COLUMNS), *((e.name, *_values(e)) for e in summaries)])


def _values(summary: PairSummary) -> Iterator[str]:
    for number in (summary.num_pairs, summary.num_tokens, summary.num_trained_tokens):
        yield f"{number:,}"
    for mean in (summary.prompt, summary.chosen, summary.rejected):
        yield f"{mean:,.1f}"
    yield f"{summary.chosen_longer:.0%}"
    for number in (summary.p95, summary.longest, summary.num_cut, summary.num_with_reference):
        yield f"{number:,}"


def write_per_pair(table: PairTable, names: Sequence[str], file: TextIO) -> None:
    """A line for each pair, separated by tabs; rows and pairs count from 1."""
    columns = ("row", "source", "pair", "tokens", "trained", "prompt", "chosen", "rejected")
    print(*columns, sep="\t", file=file)
    values = (
        *(table.row + 1, table.source, table.number + 1, table.num_tokens, table.num_trained),
        *(table.prompt, table.chosen, table.rejected),
    )
    for row, source, *others in zip(*(column.tolist() for column in values), strict=True):
        print(row, names[source], *others, sep="\t", file=file)
