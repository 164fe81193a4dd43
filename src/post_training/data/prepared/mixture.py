"""Which rows of several datasets make up the mixture, and in which order.

Of each dataset: a subsample, then duplication, then the caps; then, where the datasets have
weights, the largest mixture in those shares that needs no row more often than it is there. One
dataset that is used whole keeps its order; any other mixture is shuffled. It all depends on the
seed and on the rows alone.
"""

from collections.abc import Sequence

import numpy as np

from post_training.core.errors import PostTrainingError
from post_training.data.config import DatasetConfig
from post_training.data.order import permutation


def choose_rows(
    datasets: Sequence[DatasetConfig],
    num_rows: Sequence[int],
    seed: int,
    num_tokens: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Numbers of the rows to use, int64; a row may be there several times.

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


def _subsample(order: np.ndarray, dataset: DatasetConfig, index: int) -> np.ndarray:
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


def _repeated(order: np.ndarray, dataset: DatasetConfig) -> np.ndarray:
    if dataset.duplication_factor is None:
        return order
    whole, share = divmod(dataset.duplication_factor, 1)
    return np.concatenate([np.tile(order, int(whole)), order[: round(share * len(order))]])


def _in_shares(chosen: list[np.ndarray], weights: Sequence[float]) -> list[np.ndarray]:
    """The longest beginnings of each that are in the proportion of the weights."""
    shares = np.array(weights) / sum(weights)
    total = min(len(order) / share for order, share in zip(chosen, shares, strict=True))
    # The dataset that limits the total is used whole, whatever its quotient was rounded to.
    counts = np.floor(total * shares + 1e-6).astype(int)
    return [order[: max(1, count)] for order, count in zip(chosen, counts, strict=True)]
