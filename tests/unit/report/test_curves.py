"""Lines of figures as the series of charts."""

import json

import pytest

from post_training.report import curves
from post_training.report.curves import make_charts, read_curves, read_losses, sparkline


def write_lines(folder, lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def line(step, loss, **more):
    return {"step": step, "loss": loss, "num_tokens": 100 * step, "timing": {}, **more}


def test_curves_of_a_run_without_figures_are_none(tmp_path):
    assert read_curves(tmp_path) is None
    assert read_losses(tmp_path) == []


def test_curves_have_every_figure_and_evaluations_on_their_own_axis(tmp_path):
    lines = [
        line(1, 3.0, kl=0.5),
        {"step": 1, "eval": {"loss": 3.5}, "timing": {"time": "x"}},
        line(2, 2.0, timing={"peak_memory_bytes": 3 << 30, "time": "x"}),
    ]
    found = read_curves(write_lines(tmp_path, lines))
    train, evaluation = found.axes["train"], found.axes["eval"]
    assert (train.steps, train.tokens) == ([1, 2], [100, 200])
    assert train.figures == {
        "loss": [3.0, 2.0],
        "kl": [0.5, None],
        "timing.peak_memory_bytes": [None, 3.0],
    }
    # An evaluation has the tokens of the line before it.
    assert (evaluation.steps, evaluation.tokens) == ([1], [100])
    assert evaluation.figures == {"loss": [3.5]}
    charts = {chart.title: chart for chart in make_charts([found])}
    assert list(charts) == ["Loss", "KL divergence from the reference", "Peak memory (GiB)"]
    assert [each.name for each in charts["Loss"].series] == ["loss", "loss, held out"]


def test_curves_leave_out_damaged_lines_and_say_so(tmp_path, capsys):
    write_lines(tmp_path, [line(1, 1.0), "not json\n", '{"loss": 1}\n', line(2, 2.0)])
    found = read_curves(tmp_path)
    assert (found.axes["train"].steps, found.num_damaged) == ([1, 2], 2)
    assert "metrics.jsonl: 2 lines are no figures" in capsys.readouterr().err


def test_curves_of_a_long_run_keep_spikes_the_first_line_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "MOST_POINTS", 40)
    lines = [line(step, 2.0 - step / 1000) for step in range(1, 501)]
    lines[322]["loss"] = 9.0
    lines[123]["loss"] = -9.0
    found = read_curves(write_lines(tmp_path, lines))
    steps = found.axes["train"].steps
    assert found.num_lines == 500
    assert len(steps) == found.num_drawn <= 40
    assert {1, 323, 124, 500} <= set(steps)
    assert steps == sorted(steps)


def test_charts_of_several_runs_share_a_chart_and_unknown_figures_have_one(tmp_path):
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append(read_curves(write_lines(tmp_path / name, [line(1, 1.0, odd_thing=4)])))
    charts = {chart.title: chart for chart in make_charts([*runs, None])}
    assert [each.run for each in charts["Loss"].series] == [0, 1]
    assert [each.values for each in charts["Odd thing"].series] == [[4], [4]]


def test_read_losses_takes_lines_spaced_over_the_run(tmp_path):
    write_lines(tmp_path, [line(step, float(step)) for step in range(101)])
    assert read_losses(tmp_path, 5) == [0.0, 25.0, 50.0, 75.0, 100.0]


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([1.0], ""), ([2.0, 1.0], "█▁"), ([1, 1, 1], "▁▁▁"), ([0, 7, 3.5], "▁█▅")],
)
def test_sparkline_spans_from_the_least_to_the_largest(values, text):
    assert sparkline(values) == text
