"""Speeds by a clock that a test turns."""

import pytest
import torch

from post_training.train.throughput import WARMUP_STEPS, ModelFlops, Throughput, peak_memory_bytes

FLOPS = ModelFlops(body=60.0, head=6.0, attention=2.0)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(throughput, clock, seconds_of_steps):
    """Steps of 100 tokens, 40 of them trained, in sequences of 60 and 40."""
    throughput.begin()
    for seconds in seconds_of_steps:
        clock.now += seconds
        throughput.end_step(100, 40, 60**2 + 40**2)


def speeds(measured):
    return {key: value for key, value in measured.items() if key != "peak_memory_bytes"}


def test_throughput_line_counts_all_its_steps():
    clock = Clock()
    throughput = Throughput(FLOPS, 10_000.0, clock=clock)
    run(throughput, clock, [8, 1, 1])
    needed = 60 * 100 + 6 * 40 + 2 * 5200
    assert speeds(throughput.end_line()) == {
        "step_s": round(10 / 3, 4),
        "tokens_per_s": 30.0,
        "trained_tokens_per_s": 12.0,
        "mfu": round(3 * needed / 10 / 10_000, 4),
    }
    run(throughput, clock, [2])
    assert throughput.end_line()["tokens_per_s"] == 50.0


def test_throughput_summary_leaves_the_first_steps_out():
    clock = Clock()
    throughput = Throughput(FLOPS, 10_000.0, clock=clock)
    run(throughput, clock, [50] * WARMUP_STEPS + [2, 2])
    summary = throughput.summary()
    assert (summary["num_steps"], summary["step_s"], summary["tokens_per_s"]) == (2, 2.0, 50.0)
    assert summary["mfu"] == round((60 * 100 + 6 * 40 + 2 * 5200) / 2 / 10_000, 4)


def test_throughput_summary_of_a_run_that_ends_too_early_has_no_speed():
    clock = Clock()
    throughput = Throughput(FLOPS, 10_000.0, clock=clock)
    run(throughput, clock, [1] * WARMUP_STEPS)
    assert speeds(throughput.summary()) == {"num_steps": 0}


def test_throughput_does_not_count_what_came_before_or_in_a_pause():
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now += 500  # the model is loaded
    run(throughput, clock, [2])
    with throughput.paused():
        clock.now += 1000
    run(throughput, clock, [2])
    assert throughput.end_line()["step_s"] == 2.0


def test_throughput_begins_once():
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.begin()
    clock.now += 2
    run(throughput, clock, [2])
    assert throughput.end_line()["step_s"] == 4.0


@pytest.mark.parametrize(("flops", "peak"), [(None, 1e12), (FLOPS, None)])
def test_throughput_without_known_flops_or_peak_has_no_mfu(flops, peak):
    clock = Clock()
    throughput = Throughput(flops, peak, clock=clock)
    run(throughput, clock, [1] * (WARMUP_STEPS + 1))
    assert "mfu" not in throughput.end_line()
    assert "mfu" not in throughput.summary()


def test_throughput_peak_memory_is_at_least_what_is_held():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = torch.ones(2**27, dtype=torch.float64, device=device)  # 1 GiB
    assert held.nbytes <= peak_memory_bytes() < 2**40
