"""Which row is used when.

The rows are shuffled anew for each epoch, and the epochs follow one another without a seam: every
batch is full, whatever the number of rows, and a position in the stream depends on the seed alone,
never on batch sizes, ranks or where the run was stopped.
"""

import hashlib
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def row_stream(num_rows: int, seed: int) -> Iterator[int]:
    """Row indices without end; each run of `num_rows` of them is a permutation of all rows."""
    for epoch in count():
        yield from map(int, permutation(num_rows, f"row order, seed {seed}, epoch {epoch}"))


def permutation(length: int, label: str) -> "np.ndarray":
    """0 … length - 1 in an order that `label` decides, as int64 [length].

    Sorted by the output of SHAKE-256, a standard: numpy may change the numbers of its generators
    (NEP 19) and Python promises only `random()`, but what a seed means must never change.
    """
    import numpy as np

    keys = hashlib.shake_256(label.encode()).digest(8 * length)
    return np.argsort(np.frombuffer(keys, "<u8"), kind="stable")
