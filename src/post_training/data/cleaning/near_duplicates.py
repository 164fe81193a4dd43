"""Rows that are nearly the same, by MinHash and locality-sensitive hashing.

    words -> shingles of 5 words -> signature (120 minima) -> 20 bands of 6 -> pairs -> clusters

The share of equal places of two signatures estimates the Jaccard similarity of the rows' shingles
(Broder 1997, "On the resemblance and containment of documents"), with a standard error of at most
0.046. Rows whose signatures agree in a band are compared; a pair of similarity 0.8 agrees in one
with probability 1 - (1 - 0.8^6)^20 = 0.998, one of 0.5 with 0.27 (and is then told apart).

Signatures lie in a file, 480 bytes a row; memory holds some 40 bytes a row. Every number is drawn
from a fixed seed, and the order of the rows alone decides which one of a cluster stays: the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from jaxtyping import Int64, UInt32

from post_training.data.cleaning.words import hash_ngrams

SHINGLE = 5
_BANDS, _ROWS = 20, 6
NUM_MINIMA = _BANDS * _ROWS
_SEED = 20
_generator = np.random.Generator(np.random.PCG64(_SEED))
# Of h -> (factor * h + term) mod 2^64, whose upper half is kept; odd factors, so that it permutes.
_FACTORS = _generator.integers(0, 1 << 63, NUM_MINIMA, np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _generator.integers(0, 1 << 63, NUM_MINIMA, np.uint64)
_MIXER = np.uint64(0x9E3779B97F4A7C15)
_UPPER = np.uint64(32)
_SHINGLES_AT_ONCE = 1024  # some megabytes, which a processor's cache holds
_PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class NearDuplicate:
    """row: is nearly the same as `match`, before it. kept: the first of their cluster. similarity:
    the estimate for row and match."""

    row: int
    match: int
    kept: int
    similarity: float


def signature(words: list[str]) -> UInt32[np.ndarray, " minima"]:
    """NUM_MINIMA of a row's shingles. A row of fewer words than a shingle has one shingle, all of
    it; one without words has none, and its signature is all ones."""
    hashes = np.unique(hash_ngrams(words, min(SHINGLE, max(len(words), 1))))
    least = np.full(NUM_MINIMA, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(hashes), _SHINGLES_AT_ONCE):
        block = hashes[start : start + _SHINGLES_AT_ONCE, None] * _FACTORS
        block += _TERMS
        np.minimum(least, block.min(axis=0), out=least)
    return (least >> _UPPER).astype(np.uint32)


def find_near_duplicates(file: IO[bytes], threshold: float) -> Iterator[NearDuplicate]:
    """The rows to leave out, in order. file: the signatures of all rows, one after another; not
    empty. threshold: from which estimate on two rows are nearly the same."""
    signatures = np.memmap(file, "<u4", "r").reshape(-1, NUM_MINIMA)
    first = np.arange(len(signatures))  # of each row, a row of its cluster before it, or itself
    match = np.full(len(signatures), -1)
    similarity = np.zeros(len(signatures), np.float32)
    for band in range(_BANDS):
        for pairs in _pairs_of_band(signatures, band):
            # Most pairs of later bands are known from the earlier ones.
            new = pairs[_roots(first, pairs[:, 0]) != _roots(first, pairs[:, 1])]
            for block in np.array_split(new, len(new) // _PAIRS_AT_ONCE + 1):
                one, other = (signatures[column] for column in block.T)
                equal = (one == other).mean(axis=1, dtype=np.float64)
                for (before, after), share in zip(block.tolist(), equal.tolist(), strict=True):
                    if share >= threshold:
                        _join(first, before, after)
                        if match[after] < 0:
                            match[after], similarity[after] = before, share
    roots = _roots(first, np.arange(len(first)))
    for row in np.flatnonzero(roots != np.arange(len(roots))).tolist():
        # A row that only later ones are like is joined to its cluster by them.
        found = int(match[row]) if match[row] >= 0 else int(roots[row])
        alike = (
            similarity[row] if match[row] >= 0 else (signatures[row] == signatures[found]).mean()
        )
        yield NearDuplicate(row, found, int(roots[row]), round(float(alike), 2))


def _pairs_of_band(
    signatures: UInt32[np.ndarray, "R minima"], band: int
) -> Iterator[Int64[np.ndarray, "pairs 2"]]:
    """Each row of a bucket with the bucket's first one; then with the one before."""
    own = signatures[:, band * _ROWS : (band + 1) * _ROWS]
    keys = np.zeros(len(own), np.uint64)
    for column in own.T:
        keys = (keys ^ column.astype(np.uint64)) * _MIXER
        keys ^= keys >> _UPPER
    keys[(own == np.iinfo(np.uint32).max).all(axis=1)] = 0  # no words: like no other row
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.concatenate([[True], keys[1:] != keys[:-1]])
    of_bucket = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # where each one's bucket begins
    member = np.flatnonzero(~starts & (keys != 0))
    yield np.stack([order[of_bucket[member]], order[member]], axis=1)
    yield np.stack([order[member - 1], order[member]], axis=1)


def _roots(
    first: Int64[np.ndarray, " R"], rows: Int64[np.ndarray, " some"]
) -> Int64[np.ndarray, " some"]:
    while True:
        above = first[rows]
        if np.array_equal(above, rows):
            return rows
        rows = above


def _join(first: Int64[np.ndarray, " R"], one: int, other: int) -> None:
    """The cluster's first row is the root of both; paths are halved on the way."""
    roots = []
    for row in (one, other):
        while first[row] != row:
            first[row] = first[first[row]]
            row = int(first[row])
        roots.append(row)
    first[max(roots)] = min(roots)
