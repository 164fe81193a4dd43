"""What is said of a loss or gradient that is not finite, and that all ranks say it."""

from math import inf, nan
from pathlib import Path

import pytest

from helpers.gloo_ranks import on_ranks
from helpers.rank_functions import gradient_only, loss_on_second_rank
from post_training.core.errors import PostTrainingError
from post_training.stages.context import Ranks, StageContext
from post_training.train.metrics import MicroBatchLoss, stop_unless_finite

ALONE = StageContext(Path())


def batches(*losses, num_rows=2):
    """Micro-batches of consecutive rows, from row 10 on."""
    return [
        MicroBatchLoss(loss, tuple(range(10 + num_rows * n, 10 + num_rows * (n + 1))))
        for n, loss in enumerate(losses)
    ]


def problem(loss, grad_norm, micro_batches):
    with pytest.raises(PostTrainingError) as raised:
        stop_unless_finite(7, loss, grad_norm, micro_batches, ALONE)
    assert raised.value.hint.startswith("lower training.learning_rate")
    return raised.value.problem


def test_finite_step_goes_on_without_asking_the_other_ranks():
    # There is no process group here: asking would fail.
    two_ranks = StageContext(Path(), Ranks(0, 0, 2, 2))
    stop_unless_finite(7, 1.5, 0.0, batches(1.0, 2.0), two_ranks)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_loss_that_is_not_finite_is_told_with_its_rows(value):
    assert problem(value, nan, batches(1.0, value, 2.0)) == (
        f"loss is not finite at step 7 (got {value}) with rows 12, 13 on rank 0; "
        "stopped before its update counts"
    )


def test_gradient_that_is_not_finite_is_told_with_all_rows():
    assert problem(1.5, inf, batches(1.0, 2.0)) == (
        "gradient norm is not finite at step 7 (got inf) with rows 10, 11, 12, 13 on rank 0; "
        "stopped before its update counts"
    )


def test_long_list_of_rows_is_cut():
    told = problem(nan, 1.0, batches(nan, num_rows=20))
    assert "with rows 10, 11, 12, 13, 14, 15, 16, 17 and 12 more on rank 0;" in told
    told = problem(nan, 1.0, batches(nan, num_rows=8))
    assert "with rows 10, 11, 12, 13, 14, 15, 16, 17 on rank 0;" in told


@pytest.mark.parametrize(
    ("function", "blamed"),
    [
        (loss_on_second_rank, "loss is not finite at step 7 (got nan) with rows 101 on rank 1;"),
        (
            gradient_only,
            "gradient norm is not finite at step 7 (got inf) with rows 0, 1 on rank 0; "
            "rows 100, 101 on rank 1;",
        ),
    ],
)
def test_both_ranks_stop_with_the_same_words(tmp_path, function, blamed):
    first, second = on_ranks(function, 2, tmp_path)
    assert first == second
    assert first.startswith(blamed)
