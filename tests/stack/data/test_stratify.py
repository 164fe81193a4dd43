import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.order import choose_evaluation_rows


@given(
    strata=st.lists(st.integers(0, 4), min_size=2, max_size=200),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
def test_choose_evaluation_rows_gives_each_stratum_its_quota(strata, share, seed):
    strata = np.array(strata)
    number = round(share * len(strata))
    if not 0 < number < len(strata):
        return
    chosen = choose_evaluation_rows(strata, share, seed)
    assert len(chosen) == number
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    for stratum in np.unique(strata):
        size = int((strata == stratum).sum())
        quota = size * number / len(strata)
        assert np.floor(quota) <= (strata[chosen] == stratum).sum() <= np.ceil(quota)


def test_choose_evaluation_rows_differ_by_seed_and_not_by_run():
    strata = np.zeros(100, int)
    first, again, other = (choose_evaluation_rows(strata, 10, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("size", [0.001, 20, 25])
def test_choose_evaluation_rows_refuses_to_leave_a_side_empty(size: float):
    with pytest.raises(PostTrainingError, match="of 20 rows would be for evaluation"):
        choose_evaluation_rows(np.zeros(20, int), size, 0)
