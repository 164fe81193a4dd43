from itertools import cycle, islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from post_training.data.order import row_stream, times_used


@given(num_rows=st.integers(1, 50), seed=st.integers(0, 2**32), num_epochs=st.integers(1, 4))
def test_row_stream_uses_every_row_once_an_epoch(num_rows: int, seed: int, num_epochs: int):
    rows = list(islice(row_stream(num_rows, seed), num_rows * num_epochs))
    for epoch in range(num_epochs):
        assert sorted(rows[epoch * num_rows :][:num_rows]) == list(range(num_rows))


def test_row_stream_is_the_same_on_every_machine():
    # Written down once: a change here changes what every seed means.
    assert list(islice(row_stream(8, 0), 16)) == [
        *(7, 5, 1, 3, 0, 4, 2, 6),
        *(0, 6, 7, 2, 4, 3, 1, 5),
    ]


def test_row_stream_epochs_and_seeds_differ():
    first, second, other = (
        list(islice(row_stream(100, seed), start, start + 100))
        for seed, start in ((0, 0), (0, 100), (1, 0))
    )
    assert first != second
    assert first != other


@given(num_rows=st.integers(1, 20), seed=st.none() | st.integers(0, 99), num=st.integers(0, 70))
def test_times_used_counts_what_training_reads(num_rows: int, seed: int | None, num: int):
    stream = cycle(range(num_rows)) if seed is None else row_stream(num_rows, seed)
    expected = np.bincount(list(islice(stream, num)), minlength=num_rows)
    assert times_used(num_rows, num, seed).tolist() == expected.tolist()
