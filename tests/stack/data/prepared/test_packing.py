"""PackedRows against textbook packing, sequence by sequence and row by row."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.prepared.packing import pack, reorder, shuffle_rows, utilisation

METHODS = ["none", "bfd", "k_bin_packed", "next_fit"]

capacities = st.integers(1, 40)
# Few different lengths give many ties; all the lengths give many different rows.
problems = capacities.flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity), max_size=80)
        | st.lists(st.sampled_from([1, (capacity + 2) // 3, (capacity + 1) // 2]), max_size=80),
        st.just(capacity),
    )
)


def planned(lengths, capacity, method):
    rows = pack(np.array(lengths, np.int64), capacity, method)
    return [row.tolist() for row in rows]


def best_fit(lengths, capacity, order, num_open):
    """Best fit in this order, by looking at every open row; the rows in the order of opening."""
    rows, open_rows = [], []

    def room(row):
        return capacity - sum(lengths[index] for index in row)

    for index in order:
        fitting = [row for row in open_rows if room(row) >= lengths[index]]
        if fitting:
            min(fitting, key=room).append(index)
            continue
        if len(open_rows) == num_open:
            open_rows.remove(min(open_rows, key=room))
        rows.append([index])
        open_rows.append(rows[-1])
    return rows


@given(problems)
def test_packing_bfd_equals_the_textbook(problem):
    lengths, capacity = problem
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    assert planned(lengths, capacity, "bfd") == best_fit(lengths, capacity, order, None)


@given(problems)
def test_packing_k_bin_packed_equals_the_textbook(problem):
    lengths, capacity = problem
    expected = best_fit(lengths, capacity, range(len(lengths)), 16)
    assert planned(lengths, capacity, "k_bin_packed") == expected


def test_packing_k_bin_packed_closes_the_fullest_row():
    # 16 rows with room for 1 to 16; 17 opens another and closes the one with room for 1.
    lengths = [*range(33, 17, -1), 17, 1]
    rows = planned(lengths, 34, "k_bin_packed")
    assert rows[:2] == [[0], [1, 17]]
    assert rows[16] == [16]


@given(problems)
def test_packing_next_fit_equals_the_textbook(problem):
    lengths, capacity = problem
    expected = []
    for index, length in enumerate(lengths):
        if expected and sum(lengths[i] for i in expected[-1]) + length <= capacity:
            expected[-1].append(index)
        else:
            expected.append([index])
    assert planned(lengths, capacity, "next_fit") == expected


@given(problems, st.sampled_from(METHODS), st.integers(0, 9))
def test_packing_has_every_sequence_once_within_the_capacity(problem, method, seed):
    lengths, capacity = problem
    rows = shuffle_rows(pack(np.array(lengths, np.int64), capacity, method), seed)
    assert sorted(rows.sequences.tolist()) == list(range(len(lengths)))
    assert rows.offsets.dtype == rows.sequences.dtype == np.int64
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(lengths)
    for start, end in pairwise(rows.offsets):
        assert 1 <= sum(lengths[index] for index in rows.sequences[start:end]) <= capacity


def test_packing_of_many_lengths_above_16_bits_equals_the_textbook():
    lengths = np.random.default_rng(0).integers(1, 200_000, 400).tolist()
    order = sorted(range(400), key=lambda index: -lengths[index])
    assert planned(lengths, 200_000, "bfd") == best_fit(lengths, 200_000, order, None)


def test_packing_into_more_rows_than_16_bits_keeps_their_order():
    rows = pack(np.full(70_000, 7), 7, "bfd")
    assert rows.sequences.tolist() == rows.offsets[:-1].tolist() == list(range(70_000))


@pytest.mark.parametrize("method", METHODS)
def test_packing_of_nothing_is_no_rows(method):
    rows = pack(np.array([], np.int64), 8, method)
    assert len(shuffle_rows(rows, 0)) == len(rows) == 0
    assert utilisation(0, len(rows), 8) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("length", "told"), [(9, "has 9 tokens"), (0, "has 0"), (-1, "has -1")])
def test_packing_length_outside_the_capacity_is_refused(method, length, told):
    with pytest.raises(PostTrainingError, match=f"sequence 2 {told}.*1 to 8.*2 such sequences"):
        pack(np.array([8, 1, length, length]), 8, method)


def test_packing_shuffle_moves_whole_rows_and_depends_on_the_seed_alone():
    lengths = np.tile([5, 4, 3, 2, 1], 20)
    rows = pack(lengths, 6, "k_bin_packed")
    before = [row.tolist() for row in rows]
    after = [row.tolist() for row in shuffle_rows(rows, 1)]
    assert after != before
    assert sorted(after) == sorted(before)
    assert after == [row.tolist() for row in shuffle_rows(rows, 1)]
    assert after != [row.tolist() for row in shuffle_rows(rows, 2)]


def test_packing_rows_reordered_are_whole():
    rows = pack(np.array([5, 4, 3, 2]), 6, "bfd")
    assert [row.tolist() for row in rows] == [[0], [1, 3], [2]]
    assert [row.tolist() for row in reorder(rows, np.array([1, 2, 0]))] == [[1, 3], [2], [0]]


def test_packing_shuffle_is_the_same_everywhere():
    shuffled = shuffle_rows(pack(np.ones(8, np.int64), 1, "none"), seed=7)
    assert shuffled.sequences.tolist() == [7, 5, 1, 3, 6, 4, 2, 0]


def test_packing_utilisation_is_the_share_of_places_with_a_token():
    lengths = np.array([5, 4, 3, 2])
    assert utilisation(14, len(pack(lengths, 6, "bfd")), 6) == 14 / 18
