"""How far a piece of work is, in a log: a line at times, with the time that is left."""

import sys
from types import SimpleNamespace

import pytest

from helpers.terminal import COLOURS, run_in_terminal
from post_training.stages import context
from post_training.stages.context import Progress


@pytest.fixture
def clock(monkeypatch):
    """Of which the test turns the hand: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(context, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lines_of(progress, clock, capsys, updates):
    with progress:
        for seconds, done, figures in updates:
            clock.now = 100.0 + seconds
            progress.update(done, figures)
    return capsys.readouterr().err.splitlines()


def test_log_has_a_line_after_two_seconds_then_every_half_minute(clock, capsys):
    updates = [(1, 1, ""), (2, 2, "loss 2.0"), (31, 31, ""), (32, 32, "loss 1.0")]
    lines = lines_of(Progress("step", 1000, shown=True), clock, capsys, updates)
    assert lines == [
        "step 2/1000 · loss 2.0 · 16 min left",
        "step 32/1000 · loss 1.0 · 16 min left",
    ]


def test_time_left_is_reckoned_without_what_an_earlier_attempt_did(clock, capsys):
    updates = [(10, 90, ""), (50, 95, ""), (80, 100, "")]
    lines = lines_of(Progress("step", 100, shown=True, done=90), clock, capsys, updates)
    assert lines == ["step 90/100", "step 95/100 · 50 s left", "step 100/100"]


def test_count_without_a_total_has_no_time_left(clock, capsys):
    lines = lines_of(Progress("row", None, shown=True), clock, capsys, [(5, 12345, "")])
    assert lines == ["row 12,345"]


def test_progress_of_another_rank_is_silent(clock, capsys):
    assert lines_of(Progress("step", 9, shown=False), clock, capsys, [(5, 9, "")]) == []


THREE_STEPS = """
from post_training.stages.context import Progress

with Progress("step", 3, shown=True) as progress:
    for step in (1, 2, 3):
        progress.update(step, "loss 2.0")
"""


def test_terminal_has_a_bar_without_colours_where_none_are_wanted(tmp_path):
    program = [sys.executable, "-c", THREE_STEPS]
    for wish, is_coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        code, shown = run_in_terminal(program, tmp_path, **wish)
        assert (code, bool(COLOURS.search(shown))) == (0, is_coloured)
        assert "3/3" in shown
        assert "━" in shown


def test_terminal_that_cannot_go_back_has_lines_as_a_log(tmp_path):
    program = [sys.executable, "-c", THREE_STEPS]
    assert run_in_terminal(program, tmp_path, TERM="dumb") == (0, "step 3/3 · loss 2.0\n")
