"""Which sequences share a row of at most `capacity` tokens (a packed row).

    lengths -> pack -> PackedRows -> shuffle_rows -> the order in which rows are trained on

Every sequence is in exactly one row, whole; a row never exceeds the capacity. Only lengths are
looked at, so that any number of tokens is planned with a few arrays of one number per sequence.

Worst cases, in rows against the fewest possible: best fit decreasing 11/9 (Johnson, 1973); best
fit among k ≥ 2 open rows 17/10 (Csirik and Johnson, Algorithmica 31, 2001); next fit 2. Chat data
comes within 0.01% (bfd) and 0.5% (k = 16) of full rows: reproducibility/benchmarks/packing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
from jaxtyping import Int64, Integer

from post_training.core.errors import PostTrainingError
from post_training.data.config import Packing
from post_training.data.order import permutation

NUM_OPEN_ROWS = 16


@dataclass(frozen=True)
class PackedRows:
    """Row r holds sequences[offsets[r]:offsets[r + 1]], in this order.

    sequences: each index of `lengths` once.
    """

    offsets: Int64[np.ndarray, " bounds"]
    sequences: Int64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " own"]:
        return self.sequences[self.offsets[row] : self.offsets[row + 1]]


def pack(lengths: Integer[np.ndarray, " N"], capacity: int, method: Packing) -> PackedRows:
    """Decide which sequences share a row, from their lengths in tokens.

    bfd: sequences from long to short (equal ones in their order), each into the fullest row that
    has room, of equally full ones the first. k_bin_packed: in the data's order, each into the
    fullest with room of at most 16 open rows; when none has room and 16 are open, the fullest is
    closed for good. next_fit: the same with one open row. none: a row for each.
    Errors: PostTrainingError for a length that is not between 1 and the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_lengths(lengths, capacity)
    if method == "none":
        return PackedRows(np.arange(len(lengths) + 1), np.arange(len(lengths)))
    if method == "bfd":
        # From long to short; of equal ones, the first stays the first.
        sequences = _stable_order(capacity - lengths, capacity)
        row_of = _best_fit_decreasing(lengths[sequences], capacity)
    else:
        num_open = {"k_bin_packed": NUM_OPEN_ROWS, "next_fit": 1}[method]
        sequences = np.arange(len(lengths))
        row_of = np.fromiter(_bounded_best_fit(lengths, capacity, num_open), np.int64, len(lengths))
    num_rows = int(row_of.max(initial=-1)) + 1
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
    return PackedRows(offsets, sequences[_stable_order(row_of, num_rows)])


def shuffle_rows(rows: PackedRows, seed: int) -> PackedRows:
    """The rows in an order that depends on the seed and their number alone."""
    return reorder(rows, permutation(len(rows), f"packed rows, seed {seed}"))


def reorder(rows: PackedRows, order: Int64[np.ndarray, " R"]) -> PackedRows:
    """Row r of the result is row order[r]."""
    sizes = np.diff(rows.offsets)[order]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    # The k-th sequence of a row moves by as much as the row's first.
    moved_by = np.repeat(rows.offsets[:-1][order] - offsets[:-1], sizes)
    return PackedRows(offsets, rows.sequences[np.arange(len(rows.sequences)) + moved_by])


def utilisation(num_tokens: int, num_rows: int, capacity: int) -> float:
    """The share of the rows' places that hold a token; 0.0 when there is no row."""
    return num_tokens / (num_rows * capacity) if num_rows else 0.0


def _check_lengths(lengths: Int64[np.ndarray, " N"], capacity: int) -> None:
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        index = int(wrong[0])
        raise PostTrainingError(
            f"sequence {index} has {lengths[index]} tokens, must have 1 to {capacity} to be "
            f"packed ({len(wrong)} such sequences)"
        )


def _best_fit_decreasing(
    lengths: Int64[np.ndarray, " N"], capacity: int
) -> Int64[np.ndarray, " N"]:
    """row_of of each sequence; `lengths` must not increase.

    All sequences of one length are placed together: once a row is the fullest with room for one,
    it stays so until it has no more room for another, so it takes as many as fit; then comes the
    next row of that fullness, then the next fullness, and what is left opens new rows.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_with = _RowsByRoom(capacity)
    bounds = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)).tolist()
    num_rows = 0
    for start, end in pairwise(bounds):
        length = int(lengths[start])
        while start < end:
            room = rows_with.least_room(length)
            per_row = (room or capacity) // length
            num_wanted = -(-(end - start) // per_row)
            if room is None:
                taken = np.arange(num_rows, num_rows + num_wanted)
                room, num_rows = capacity, num_rows + num_wanted
            else:
                taken = rows_with.take(room, num_wanted)
            num_placed = min(end - start, len(taken) * per_row)
            row_of[start : start + num_placed] = np.repeat(taken, per_row)[:num_placed]
            num_full, num_in_last = divmod(num_placed, per_row)
            rows_with.add(room - per_row * length, taken[:num_full])
            rows_with.add(room - num_in_last * length, taken[num_full:])
            start += num_placed
    return row_of


class _RowsByRoom:
    """PackedRows by how many tokens they still have room for; the first of them are taken first."""

    def __init__(self, capacity: int):
        self._parts: list[list[np.ndarray]] = [[] for _ in range(capacity)]
        self._filled = 0  # bit r: there are rows with room r

    def least_room(self, length: int) -> int | None:
        """The smallest room ≥ length that some row has."""
        above = self._filled >> length
        return length + (above & -above).bit_length() - 1 if above else None

    def add(self, room: int, rows: Int64[np.ndarray, " added"]) -> None:
        if len(rows) and room:
            self._parts[room].append(rows)
            self._filled |= 1 << room

    def take(self, room: int, number: int) -> Int64[np.ndarray, " taken"]:
        """At most `number` rows, and at least one, with exactly this room."""
        parts = self._parts[room]
        # Each part is sorted, so the stable sort only merges them.
        rows = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts), kind="stable")
        taken, left = rows[:number], rows[number:]
        self._parts[room] = [left] if len(left) else []
        if not len(left):
            self._filled ^= 1 << room
        return taken


def _bounded_best_fit(
    lengths: Int64[np.ndarray, " N"], capacity: int, num_open: int
) -> Iterator[int]:
    """Yield the row of each sequence, one by one; needs no more memory than the open rows."""
    open_rows: list[tuple[int, int]] = []  # (room, row): the fullest first, then the first
    new_rows = count()
    for length in map(int, lengths):
        fitting = bisect_left(open_rows, (length, 0))
        if fitting < len(open_rows):
            room, row = open_rows.pop(fitting)
        else:
            room, row = capacity, next(new_rows)
            if len(open_rows) == num_open:
                del open_rows[0]
        insort(open_rows, (room - length, row))
        yield row


def _stable_order(keys: Int64[np.ndarray, " N"], largest: int) -> Int64[np.ndarray, " N"]:
    """argsort of integers from 0 to `largest`; equal keys keep their order.

    By 16 bits at a time: numpy sorts those with radix sort, five times faster than wider ones.
    """
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while largest >> shift:
        digit = (keys >> shift) & 0xFFFF
        order = order[np.argsort(digit[order].astype(np.uint16), kind="stable")]
        shift += 16
    return order
