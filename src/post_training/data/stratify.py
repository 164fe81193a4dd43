"""Which rows are set apart for evaluation: of each stratum the same share as of all."""

import numpy as np

from post_training.core.errors import PostTrainingError
from post_training.data.order import permutation


def choose_evaluation_rows(strata: np.ndarray, eval_size: float, seed: int) -> np.ndarray:
    """Sorted numbers of the rows. strata: of each row, its stratum. eval_size: a share < 1 of the
    rows, rounded; or their number.

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
