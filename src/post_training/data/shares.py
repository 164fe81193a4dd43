"""What a run will have read of each source, before it starts.

Weights, subsamples and copies decide which sequences are in the rows; how many steps there are, and
the order of the rows, decide how often each row is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from post_training.data.lengths import aligned_lines


@dataclass(frozen=True)
class Reading:
    """The rows that a run reads. num_steps: of the optimizer; None where no run is configured, and
    each row is read once. times: how often each row is read."""

    num_steps: int | None
    times: Int64[np.ndarray, " R"]

    def describe(self) -> str:
        """`training reads 8,000 rows in 1,000 steps: 1.60 epochs`."""
        if self.num_steps is None:
            return "one epoch reads"
        num_read = int(self.times.sum())
        return (
            f"training reads {num_read:,} rows in {self.num_steps:,} steps, "
            f"{num_read / len(self.times):.2f} epochs of {len(self.times):,} rows"
        )


@dataclass(frozen=True)
class SourceShare:
    """What is read of a source. num_read: sequences or pairs, each as often as it is read. The
    shares are of all sources, from 0 to 1; share_of_trained is its share of a loss that is averaged
    over tokens."""

    name: str
    num_read: int
    num_tokens: int
    num_trained_tokens: int
    share_of_tokens: float
    share_of_trained: float


def shares_by_source(
    names: Sequence[str],
    reading: Reading,
    *,
    row: Int64[np.ndarray, " N"],
    source: Int64[np.ndarray, " N"],
    num_tokens: Int64[np.ndarray, " N"],
    num_trained: Int64[np.ndarray, " N"],
    is_first: Bool[np.ndarray, " N"],
) -> list[SourceShare]:
    """The shares of every source, also of one that is never read.

    The arrays are of sequences (or pairs, or their pieces): row, source and tokens.
    is_first: of what is counted once.
    """
    times = reading.times[row]
    totals = [
        [int((times * each)[source == index].sum()) for each in (is_first, num_tokens, num_trained)]
        for index in range(len(names))
    ]
    all_tokens, all_trained = (max(1, sum(each[column] for each in totals)) for column in (1, 2))
    return [
        SourceShare(name, *each, round(each[1] / all_tokens, 6), round(each[2] / all_trained, 6))
        for name, each in zip(names, totals, strict=True)
    ]


def share_lines(reading: Reading, shares: Sequence[SourceShare], what: str) -> Iterator[str]:
    """A table for a terminal. what: sequences or pairs."""
    yield reading.describe()
    cells = [("source", what, "tokens", "share", "trained", "share")]
    cells += [
        (
            each.name,
            f"{each.num_read:,}",
            f"{each.num_tokens:,}",
            f"{each.share_of_tokens:.1%}",
            f"{each.num_trained_tokens:,}",
            f"{each.share_of_trained:.1%}",
        )
        for each in shares
    ]
    yield from aligned_lines(cells)
