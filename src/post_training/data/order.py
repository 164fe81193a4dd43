"""Which row is used when.

The rows are shuffled anew for each epoch, and the epochs follow one another without a seam: every
batch is full, whatever the number of rows, and a position in the stream depends on the seed alone,
never on batch sizes, ranks or where the run was stopped.
"""

import random
from collections.abc import Iterator
from itertools import count


def row_stream(num_rows: int, seed: int) -> Iterator[int]:
    """Row indices without end; each run of `num_rows` of them is a permutation of all rows."""
    for epoch in count():
        rows = list(range(num_rows))
        random.Random(f"row order, seed {seed}, epoch {epoch}").shuffle(rows)
        yield from rows
