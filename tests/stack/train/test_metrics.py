"""metrics.jsonl: what a line says, and that a resumed run writes the lines of one that was not."""

import json
from dataclasses import asdict

import pytest

from post_training.core.errors import PostTrainingError
from post_training.train.metrics import Metrics, Step, Totals

LAST, SAVED, EVALUATED = 12, 6, (3, 6, 8, 12)


def step(number):
    """Of two rows; every third step has a prompt."""
    figures = {"completion_loss": 2 / number} | ({"prompt_loss": 0.1} if number % 3 == 0 else {})
    return Step(
        step=number,
        epoch=number / 10,
        loss=1 / number,
        grad_norm=0.5,
        learning_rate=0.001 * number,
        num_rows=2,
        num_sequences=3,
        num_tokens=100 + number,
        num_trained_tokens=40,
        sum_of_squared_lengths=5000,
        figures=figures,
    )


def train(metrics, first, last):
    """Steps with their evaluations; the totals of the checkpoint on the way, as it keeps them."""
    metrics.begin()
    saved = None
    for number in range(first, last + 1):
        metrics.add(step(number), last=number == LAST)
        if number in EVALUATED:
            metrics.add_evaluation(number, {"loss": 3 / number})
        if number == SAVED:
            saved = json.loads(json.dumps(asdict(metrics.totals)))
    return saved


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path):
    return [{key: line[key] for key in line if key != "timing"} for line in lines(path)]


@pytest.fixture
def whole(tmp_path):
    """The file of a run that nobody stopped."""
    metrics = Metrics(tmp_path / "whole.jsonl", 5)
    metrics.resume(0, Totals())
    train(metrics, 1, LAST)
    return metrics.path


def test_metrics_line_has_the_mean_of_the_steps_that_have_a_figure(whole):
    first = untimed(whole)[1]
    assert first == {
        "step": 5,
        "epoch": 0.5,
        "loss": pytest.approx(sum(1 / n for n in range(1, 6)) / 5),
        "completion_loss": pytest.approx(sum(2 / n for n in range(1, 6)) / 5),
        "prompt_loss": pytest.approx(0.1),
        "grad_norm": 0.5,
        "learning_rate": 0.005,
        "num_rows": 10,
        "num_sequences": 15,
        "num_tokens": 515,
        "num_trained_tokens": 200,
    }


def test_metrics_line_counts_no_step_of_the_line_before(whole):
    second = untimed(whole)[4]
    assert second["step"] == 10
    assert second["loss"] == pytest.approx(sum(1 / n for n in range(6, 11)) / 5)
    assert second["prompt_loss"] == pytest.approx(0.1)


def test_metrics_lines_and_evaluations_come_in_the_order_of_their_steps(whole):
    kinds = [(line["step"], "eval" if "eval" in line else "train") for line in lines(whole)]
    assert kinds == [
        (3, "eval"),
        (5, "train"),
        (6, "eval"),
        (8, "eval"),
        (10, "train"),
        (12, "train"),
        (12, "eval"),
    ]


@pytest.mark.parametrize("killed_after", [SAVED, 7, 8, 11, LAST])
def test_metrics_of_a_killed_and_resumed_run_are_those_of_one_that_was_not(
    whole, tmp_path, killed_after
):
    path = tmp_path / "killed.jsonl"
    killed = Metrics(path, 5)
    killed.resume(0, Totals())
    saved = train(killed, 1, killed_after)
    with open(path, "a") as file:
        file.write('{"step": 6, "eval": {"lo')  # cut short by the kill

    resumed = Metrics(path, 5)
    resumed.resume(SAVED, Totals(**saved))
    assert (resumed.last["step"], resumed.last_evaluation["step"]) == (5, 6)
    train(resumed, SAVED + 1, LAST)
    assert untimed(path) == untimed(whole)
    assert (resumed.last["step"], resumed.last_evaluation["eval"]) == (12, {"loss": 0.25})


def test_metrics_resumed_from_the_start_keep_nothing(whole):
    metrics = Metrics(whole, 5)
    metrics.resume(0, Totals())
    assert (whole.read_text(), metrics.last, metrics.last_evaluation) == ("", {}, {})


def test_metrics_of_another_rank_count_and_write_nothing(whole, tmp_path):
    files = set(tmp_path.iterdir())
    metrics = Metrics(None, 5)
    metrics.resume(0, Totals())
    train(metrics, 1, LAST)
    assert metrics.totals.num_tokens == untimed(whole)[-2]["num_tokens"]
    assert metrics.last["loss"] == untimed(whole)[-2]["loss"]
    assert set(tmp_path.iterdir()) == files


def test_metrics_time_and_speed_are_under_timing(whole):
    timing = lines(whole)[1]["timing"]
    speeds = ["step_s", "tokens_per_s", "trained_tokens_per_s", "peak_memory_bytes"]
    assert list(timing) == ["time", *speeds]


def test_metrics_without_a_finite_evaluation_end_the_run(whole):
    metrics = Metrics(whole, 5)
    metrics.resume(LAST, Totals())
    with pytest.raises(PostTrainingError) as raised:
        metrics.add_evaluation(LAST, {"loss": float("nan")})
    assert str(raised.value) == "the evaluation at step 12: loss is not finite (got nan)"
    assert len(lines(whole)) == 7
