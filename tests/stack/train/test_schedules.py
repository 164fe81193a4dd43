"""Learning rates of every schedule, against its formula."""

from collections.abc import Callable
from math import cos, pi, sqrt
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from post_training.train.optim import SCHEDULES, transformers_arguments
from post_training.train.training_config import TrainingConfig

RATE, STEPS, WARMUP = 0.02, 40, 8


def half_cosine(x: float) -> float:
    return (1 + cos(pi * x)) / 2


def progress(step: int) -> float:
    """From 0 at the end of the warmup to 1 at the end of the run."""
    return (step - WARMUP) / (STEPS - WARMUP)


def from_zero(after: Callable[[int], float]) -> Callable[[int], float]:
    """`after` the warmup, and before it a line from 0."""
    return lambda step: step / WARMUP if step < WARMUP else after(step)


def decay(step: int) -> float:
    """The share of a decay over the last 10 steps that is done."""
    return max(0.0, (step - (STEPS - 10)) / 10)


# name, settings, warmup, factor of the learning rate at a step (the first one is 0)
CASES: dict[str, tuple[str, dict[str, Any], float, Callable[[int], float]]] = {
    "linear": ("linear", {}, WARMUP, from_zero(lambda step: 1 - progress(step))),
    "linear, warmup as a share": ("linear", {}, 0.2, from_zero(lambda step: 1 - progress(step))),
    "constant": ("constant", {}, 0, lambda step: 1),
    "constant_with_warmup": ("constant_with_warmup", {}, WARMUP, from_zero(lambda step: 1)),
    "cosine": ("cosine", {}, WARMUP, from_zero(lambda step: half_cosine(progress(step)))),
    "cosine, down and up": (
        "cosine",
        {"num_cycles": 1.0},
        WARMUP,
        from_zero(lambda step: half_cosine(2 * progress(step))),
    ),
    "cosine_with_restarts": (
        "cosine_with_restarts",
        {"num_cycles": 2},
        WARMUP,
        from_zero(lambda step: half_cosine(2 * progress(step) % 1)),
    ),
    "cosine_with_min_lr, a share": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
        WARMUP,
        from_zero(lambda step: 0.1 + 0.9 * half_cosine(progress(step))),
    ),
    "cosine_with_min_lr, a rate": (
        "cosine_with_min_lr",
        {"min_lr": 0.005},
        WARMUP,
        from_zero(lambda step: 0.25 + 0.75 * half_cosine(progress(step))),
    ),
    "cosine_warmup_with_min_lr": (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5},
        WARMUP,
        lambda step: (
            0.5 + 0.5 * step / (WARMUP - 1)
            if step < WARMUP
            else 0.1 + 0.9 * half_cosine(progress(step + 1))  # the last step is at the minimum
        ),
    ),
    "polynomial": (
        "polynomial",
        {"lr_end": 0.004, "power": 2.0},
        WARMUP,
        from_zero(lambda step: 0.2 + 0.8 * (1 - progress(step)) ** 2),
    ),
    "inverse_sqrt": ("inverse_sqrt", {}, WARMUP, from_zero(lambda step: sqrt(WARMUP / step))),
    "inverse_sqrt, timescale": (
        "inverse_sqrt",
        {"timescale": 20},
        WARMUP,
        from_zero(lambda step: sqrt(20 / (step + 20 - WARMUP))),
    ),
    "warmup_stable_decay": (
        "warmup_stable_decay",
        {"num_decay_steps": 10, "decay_type": "linear"},
        WARMUP,
        from_zero(lambda step: 1 - decay(step)),
    ),
    "warmup_stable_decay, decay as a share": (
        "warmup_stable_decay",
        {"num_decay_steps": 0.25, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        WARMUP,
        lambda step: (
            0.1 + 0.9 * step / WARMUP if step < WARMUP else 0.1 + 0.9 * (1 - sqrt(decay(step)))
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_schedule_gives_the_rates_of_its_formula(case: str):
    name, settings, warmup, factor = CASES[case]
    expected = [RATE * factor(step) for step in range(STEPS)]
    assert learning_rates(name, settings, warmup) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_every_schedule_is_tested():
    assert {name for name, *_ in CASES.values()} == set(SCHEDULES)


def test_schedule_with_a_decay_longer_than_the_run_is_refused():
    problem = "11 steps of warmup and 30 of decay don't fit into 40"
    with pytest.raises(ValueError, match=problem):
        learning_rates("warmup_stable_decay", {"num_decay_steps": 30}, 11)


def test_schedule_of_a_run_shorter_than_its_warmup_ends_on_the_way_up():
    rates = learning_rates("linear", {}, 2 * STEPS)
    assert rates == pytest.approx([RATE * step / (2 * STEPS) for step in range(STEPS)])


def test_schedule_polynomial_that_ends_with_its_warmup_is_refused():
    with pytest.raises(
        ValueError, match=r"warmup: polynomial needs a step after it \(got 40 of 40\)"
    ):
        learning_rates("polynomial", {}, STEPS)
    assert learning_rates("polynomial", {}, STEPS + 1)[-1] == pytest.approx(RATE * 39 / 41)


def test_schedule_warmup_as_a_share_leaves_a_step_of_a_short_run():
    assert transformers_arguments("linear", {}, 0.1, 1)["warmup_steps"] == 0
    assert transformers_arguments("linear", {}, 0.1, 30)["warmup_steps"] == 3


def learning_rates(name: str, settings: dict[str, Any], warmup: float) -> list[float]:
    """What each of STEPS steps is done with, by transformers and our arguments for it."""
    training = TrainingConfig(
        max_steps=STEPS,
        effective_batch_size=1,
        learning_rate=RATE,
        warmup=warmup,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=settings,
    )
    arguments = transformers_arguments(name, training.lr_scheduler_kwargs, training.warmup, STEPS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=arguments["warmup_steps"],
        num_training_steps=STEPS,
        scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"],
    )
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates
