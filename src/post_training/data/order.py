"""Which row is used when, and which rows are set apart for evaluation: by a seed alone."""

import hashlib
from collections.abc import Iterator
from itertools import count

import numpy as np
from jaxtyping import Int64, Integer

from post_training.core.errors import PostTrainingError


def row_stream(num_rows: int, seed: int) -> Iterator[int]:
    """Row indices without end; each run of `num_rows` of them is a permutation of all rows.

    The rows are shuffled anew for each epoch, and the epochs follow one another without a seam:
    every batch is full, whatever the number of rows, and a position in the stream depends on the
    seed alone, never on batch sizes, ranks or where the run was stopped.
    """
    for epoch in count():
        yield from map(int, _order_of_epoch(num_rows, seed, epoch))


def times_used(num_rows: int, num_samples: int, seed: int | None) -> Int64[np.ndarray, " R"]:
    """How often each row is among the first `num_samples` that training reads. seed: as of
    row_stream; None: the rows follow one another as they are stored, over and over."""
    epochs, rest = divmod(num_samples, num_rows)
    times = np.full(num_rows, epochs, np.int64)
    last = np.arange(num_rows) if seed is None else _order_of_epoch(num_rows, seed, epochs)
    times[last[:rest]] += 1
    return times


def _order_of_epoch(num_rows: int, seed: int, epoch: int) -> Int64[np.ndarray, " R"]:
    return permutation(num_rows, f"row order, seed {seed}, epoch {epoch}")


def permutation(length: int, label: str) -> Int64[np.ndarray, " N"]:
    """0 … length - 1 in an order that `label` decides.

    Sorted by the output of SHAKE-256, a standard: numpy may change the numbers of its generators
    (NEP 19) and Python promises only `random()`, but what a seed means must never change.
    """
    keys = hashlib.shake_256(label.encode()).digest(8 * length)
    return np.argsort(np.frombuffer(keys, "<u8"), kind="stable")


def choose_evaluation_rows(
    strata: Integer[np.ndarray, " R"], eval_size: float, seed: int
) -> Int64[np.ndarray, " chosen"]:
    """Sorted numbers of the rows for evaluation: of each stratum the same share as of all.

    strata: of each row, its stratum. eval_size: a share < 1 of the rows, rounded; or their number.
    The number is dealt out to the strata by their exact quotas, rounded down; what is left goes to
    the largest remainders (Hamilton's method), of equal ones to the first stratum.
    Errors: PostTrainingError when none, or not one row to train on, would be left.
    """
    total = len(strata)
    number = round(eval_size * total) if isinstance(eval_size, float) else eval_size
    if not 0 < number < total:
        raise PostTrainingError(
            f"{number} of {total} rows would be for evaluation; must be 1 to {total - 1}",
            where="eval_size",
        )
    _, index, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    # Integers, so that equal remainders are equal.
    counts, remainders = np.divmod(sizes.astype(np.int64) * number, total)
    left = number - int(counts.sum())
    counts[np.argsort(-remainders, kind="stable")[:left]] += 1
    order = permutation(total, f"evaluation rows, seed {seed}")
    by_stratum = order[np.argsort(index[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    chosen = [
        by_stratum[start : start + count] for start, count in zip(starts, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
