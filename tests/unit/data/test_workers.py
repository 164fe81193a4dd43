import os

import pytest

from helpers.worker_functions import die_at, fail_at, leave, power
from post_training.core.errors import PostTrainingError
from post_training.data.workers import ordered_map


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ordered_map_keeps_the_order(num_workers: int):
    results = ordered_map(power, 2, iter(range(50)), num_workers=num_workers)
    assert list(results) == [n * n for n in range(50)]


@pytest.mark.parametrize("num_items", [0, 1])
def test_ordered_map_of_few_items_needs_no_process(num_items: int):
    results = list(ordered_map(lambda state, item: os.getpid(), None, range(num_items)))
    assert results == [os.getpid()] * num_items


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ordered_map_error_comes_in_its_turn(num_workers: int):
    results = ordered_map(fail_at, 7, range(100), num_workers=num_workers)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(PostTrainingError, match="item 7 is bad"):
        next(results)


def test_ordered_map_says_so_when_a_worker_is_killed():
    with pytest.raises(PostTrainingError, match="worker process was killed"):
        list(ordered_map(die_at, 5, range(100), num_workers=2))


def test_ordered_map_says_so_when_a_worker_ends():
    with pytest.raises(PostTrainingError, match="worker process ended with exit code 3"):
        list(ordered_map(leave, 3, range(10), num_workers=2))


def test_ordered_map_does_not_run_ahead_without_bound():
    taken = []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item

    results = ordered_map(power, 1, items(), num_workers=2)
    next(results)
    assert len(taken) <= 10
    results.close()
