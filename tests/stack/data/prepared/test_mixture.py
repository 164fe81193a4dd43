from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.config import DatasetConfig
from post_training.data.prepared.mixture import choose_rows


def datasets(*settings: dict[str, Any]) -> list[DatasetConfig]:
    return [DatasetConfig(path="x.jsonl", **each) for each in settings]


def test_choose_rows_of_one_whole_dataset_keeps_their_order():
    assert choose_rows(datasets({}), [5], seed=3).tolist() == [0, 1, 2, 3, 4]


def test_choose_rows_of_two_datasets_uses_each_row_once_shuffled():
    rows = choose_rows(datasets({}, {}), [50, 30], seed=0).tolist()
    assert sorted(rows) == list(range(80))
    assert rows != sorted(rows)
    assert rows != choose_rows(datasets({}, {}), [50, 30], seed=1).tolist()


@pytest.mark.parametrize(("factor", "expected"), [(0.25, 10), (7, 7), (1.0, 40)])
def test_choose_rows_subsample_is_a_share_or_a_number(factor: float, expected: int):
    rows = choose_rows(datasets({"subsample_factor": factor}), [40], seed=0)
    assert len(set(rows.tolist())) == len(rows) == expected


def test_choose_rows_smaller_share_is_part_of_the_larger():
    few, many = (
        set(choose_rows(datasets({"subsample_factor": share}), [100], seed=5).tolist())
        for share in (0.1, 0.3)
    )
    assert few < many


def test_choose_rows_duplication_uses_a_share_once_more():
    rows = choose_rows(datasets({"duplication_factor": 2.5}), [40], seed=0).tolist()
    assert Counter(Counter(rows).values()) == {3: 20, 2: 20}
    # The share is rounded: half of 3 is two rows.
    assert len(choose_rows(datasets({"duplication_factor": 1.5}), [3], seed=0)) == 3 + 2


def test_choose_rows_caps_come_last():
    settings = {"subsample_factor": 10, "duplication_factor": 3, "max_rows": 25}
    rows = choose_rows(datasets(settings), [40], seed=0).tolist()
    assert len(rows) == 25
    assert len(set(rows)) == 10


def test_choose_rows_max_tokens_is_never_exceeded():
    tokens = np.arange(1, 41)
    rows = choose_rows(datasets({"max_tokens": 300}), [40], seed=2, num_tokens=[tokens])
    assert 300 - 40 < tokens[rows].sum() <= 300


@pytest.mark.parametrize(("limit", "num_used"), [(9, 1), (10, 2), (11, 2), (20, 4)])
def test_choose_rows_max_tokens_may_be_reached(limit: int, num_used: int):
    tokens = np.full(4, 5)
    rows = choose_rows(datasets({"max_tokens": limit}), [4], seed=0, num_tokens=[tokens])
    assert len(rows) == num_used


def test_choose_rows_smallest_weight_still_gives_a_row():
    rows = choose_rows(datasets({"weight": 1}, {"weight": 0.001}), [10, 10], seed=0)
    assert sorted(rows.tolist())[:10] == list(range(10))
    assert len(rows) == 11


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_choose_rows_weights_give_the_largest_mixture_in_their_shares(sizes, seed, data):
    weight = st.floats(0.1, 10)
    weights = data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
    chosen = choose_rows(datasets(*({"weight": w} for w in weights)), sizes, seed)
    assert len(set(chosen.tolist())) == len(chosen)
    ends = np.cumsum(sizes)
    counts = np.diff(np.searchsorted(np.sort(chosen), [0, *ends]))
    shares = np.array(weights) / sum(weights)
    limit = min(size / share for size, share in zip(sizes, shares, strict=True))
    assert all(
        abs(count - max(1, limit * share)) <= 1 for count, share in zip(counts, shares, strict=True)
    )
    assert any(count == size for count, size in zip(counts, sizes, strict=True))


def test_choose_rows_more_than_there_are_is_refused():
    with pytest.raises(PostTrainingError, match=r"subsample_factor: must be ≤ 40.*got 41"):
        choose_rows(datasets({"subsample_factor": 41}), [40], seed=0)
    with pytest.raises(PostTrainingError, match=r"datasets\[1\]: no row of 3 is left"):
        choose_rows(datasets({}, {"subsample_factor": 0.1}), [40, 3], seed=0)
