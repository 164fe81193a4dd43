"""Which sequences of several datasets are used, in which order, and which share a packed row.

    table of all sequences -> deduplicate -> first rows only -> mixture -> packing -> order of rows

Lengths alone decide, and the seed: no token is looked at.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from post_training.core.errors import PostTrainingError
from post_training.data.config import DataConfig, DatasetConfig, SequenceConfig
from post_training.data.order import permutation
from post_training.data.prepared.packing import PackedRows, pack, reorder, shuffle_rows
from post_training.data.prepared.sequences import LENGTH, SEQUENCE, SequenceBatch


@dataclass(frozen=True)
class SequenceTable:
    """All sequences, in order. Of each: the index of its dataset, its length and number of prompt
    tokens, and its digest (none where none are needed). pieces: ordered by sequence
    (sequences.py)."""

    dataset: Int32[np.ndarray, " S"]
    lengths: Int64[np.ndarray, " S"]
    num_prompt_tokens: Int64[np.ndarray, " S"]
    digests: Shaped[np.ndarray, " digests"]
    pieces: Int64[np.ndarray, "pieces 4"]


class TableBuilder:
    """Gathers batches into a table. About 60 bytes a sequence, 16 of them the digest."""

    def __init__(self) -> None:
        self.num_sequences = self.num_pieces = 0
        self.num_rows: Counter[int] = Counter()  # by dataset
        self._columns: list[tuple[np.ndarray, ...]] = []

    def add(self, dataset: int, batch: SequenceBatch) -> None:
        size = len(batch.lengths)
        pieces = batch.pieces.copy()
        pieces[:, SEQUENCE] += self.num_sequences
        index = np.full(size, dataset, np.int32)
        self._columns.append((index, batch.lengths, batch.num_prompt_tokens, batch.digests, pieces))
        self.num_sequences += size
        self.num_pieces += len(pieces)
        self.num_rows[dataset] += size

    def table(self) -> SequenceTable:
        return SequenceTable(*map(np.concatenate, zip(*self._columns, strict=True)))


@dataclass(frozen=True)
class RowPlan:
    """The packed rows: row r is pieces[offsets[r] : offsets[r + 1]].

    pieces: their columns are in sequences.py.
    sequences: those in use, as often as they are used.
    num_duplicates: how many sequences were left out for an earlier one that is the same.
    """

    offsets: Int64[np.ndarray, " bounds"]
    pieces: Int64[np.ndarray, "pieces 4"]
    sequences: Int64[np.ndarray, " used"]
    num_duplicates: int


def plan_rows(table: SequenceTable, data: DataConfig, config: SequenceConfig, seed: int) -> RowPlan:
    """Decide which sequences are used, and pack their pieces.

    Errors: PostTrainingError where a dataset has too few rows for its settings.
    """
    kept = np.unique(table.pieces[:, SEQUENCE])
    num_duplicates = 0
    if data.deduplicate:
        _, first = np.unique(table.digests[kept], return_index=True)
        num_duplicates = len(kept) - len(first)
        # np.unique sorts by digest; what is kept stays in the order of the data.
        kept = kept[np.sort(first)]
    if data.debug_subsample is not None:
        # Sequences stand in the order of the datasets, so each has a run of its own in `kept`.
        position = np.arange(len(kept)) - np.searchsorted(table.dataset[kept], table.dataset[kept])
        kept = kept[position < data.debug_subsample]
    settings = data.datasets or [DatasetConfig(path=path) for path in data.indexed]
    num_rows = np.bincount(table.dataset[kept], minlength=len(settings))
    lengths = np.split(table.lengths[kept], np.cumsum(num_rows)[:-1])
    used = kept[choose_rows(settings, num_rows.tolist(), seed, lengths)]
    pieces = table.pieces[_pieces_of(used, table.pieces[:, SEQUENCE])]
    rows = pack(pieces[:, LENGTH], config.max_seq_length, config.packing)
    if config.packing != "none":
        rows = shuffle_rows(rows, seed)
    if data.debug_oom:
        rows = _longest_first(rows, pieces[:, LENGTH])
    return RowPlan(rows.offsets, pieces[rows.sequences], used, num_duplicates)


def _pieces_of(
    sequences: Int64[np.ndarray, " used"], owners: Int64[np.ndarray, " pieces"]
) -> Int64[np.ndarray, " N"]:
    """Indices of the pieces of each of these sequences, one after another. owners: sorted."""
    first = np.searchsorted(owners, sequences)
    sizes = np.searchsorted(owners, sequences, side="right") - first
    starts = np.cumsum(sizes) - sizes
    return np.repeat(first - starts, sizes) + np.arange(sizes.sum())


def _longest_first(rows: PackedRows, lengths: Int64[np.ndarray, " N"]) -> PackedRows:
    totals = np.add.reduceat(lengths[rows.sequences], rows.offsets[:-1])
    return reorder(rows, np.argsort(-totals, kind="stable"))


def choose_rows(
    datasets: Sequence[DatasetConfig],
    num_rows: Sequence[int],
    seed: int,
    num_tokens: Sequence[Int64[np.ndarray, " _"]] | None = None,
) -> Int64[np.ndarray, " used"]:
    """The mixture: numbers of the rows to use, in order; a row may be there several times.

    Of each dataset: a subsample, then duplication, then the caps; then, where the datasets have
    weights, the largest mixture in those shares that needs no row more often than it is there. One
    dataset that is used whole keeps its order; any other mixture is shuffled.

    The rows are numbered through all datasets, num_rows[d] of dataset d. num_tokens[d]: lengths of
    its rows, needed where it has max_tokens.
    Errors: PostTrainingError for a dataset that has too few rows, or none left.
    """
    chosen = []
    for index, (dataset, size) in enumerate(zip(datasets, num_rows, strict=True)):
        order = permutation(size, f"rows of dataset {index}, seed {seed}")
        order = _repeated(_subsample(order, dataset, index), dataset)[: dataset.max_rows]
        if dataset.max_tokens is not None:
            assert num_tokens is not None
            used = np.cumsum(num_tokens[index][order])
            order = order[: np.searchsorted(used, dataset.max_tokens, side="right")]
        if not len(order):
            raise PostTrainingError(
                f"no row of {size} is left to use", where=f"data.datasets[{index}]"
            )
        chosen.append(order)
    if datasets[0].weight is not None:
        chosen = _in_shares(chosen, [dataset.weight for dataset in datasets])
    starts = np.cumsum([0, *num_rows[:-1]])
    rows = np.concatenate([start + order for start, order in zip(starts, chosen, strict=True)])
    if len(datasets) == 1 and len(rows) == num_rows[0] == len(np.unique(rows)):
        return np.arange(num_rows[0])
    return rows[permutation(len(rows), f"mixture, seed {seed}")]


def _subsample(
    order: Int64[np.ndarray, " R"], dataset: DatasetConfig, index: int
) -> Int64[np.ndarray, " used"]:
    factor = dataset.subsample_factor
    if factor is None:
        return order
    if isinstance(factor, int) and factor > len(order):
        raise PostTrainingError(
            f"must be ≤ {len(order)}, the good rows there are (got {factor})",
            where=f"data.datasets[{index}].subsample_factor",
            hint="duplication_factor uses rows several times",
        )
    return order[: factor if isinstance(factor, int) else round(factor * len(order))]


def _repeated(order: Int64[np.ndarray, " R"], dataset: DatasetConfig) -> Int64[np.ndarray, " used"]:
    if dataset.duplication_factor is None:
        return order
    whole, share = divmod(dataset.duplication_factor, 1)
    return np.concatenate([np.tile(order, int(whole)), order[: round(share * len(order))]])


def _in_shares(
    chosen: list[Int64[np.ndarray, " _"]], weights: Sequence[float]
) -> list[Int64[np.ndarray, " _"]]:
    """The longest beginnings of each that are in the proportion of the weights."""
    shares = np.array(weights) / sum(weights)
    total = min(len(order) / share for order, share in zip(chosen, shares, strict=True))
    # 1e-6: the dataset that limits the total is used whole, even where its product comes out a
    # little below its size.
    counts = np.floor(total * shares + 1e-6).astype(int)
    return [order[: max(1, count)] for order, count in zip(chosen, counts, strict=True)]
