"""Signals that a training run hears, in this process."""

import os
import signal
from collections.abc import Iterator

import pytest

from post_training.core.errors import Interrupted, PostTrainingError
from post_training.train.checkpoint import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """As a terminal starts a process, and as it was."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_noted_and_told(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    stop = StopRequest()
    with stop.listening():
        send(number)
        assert sum(stop.votes()) == 1
    stop.agree(stop.votes())
    error = stop.end(3, 10)
    assert isinstance(error, Interrupted)
    assert error.exit_code == 128 + number
    told = capfd.readouterr().err
    assert f"{number.name}: stopping after this step, with a checkpoint" in told
    assert ("Ctrl-C again stops at once" in told) == (number == signal.SIGINT)


def test_second_ctrl_c_stops_at_once(capfd: pytest.CaptureFixture[str]):
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert capfd.readouterr().err.count("SIGINT: ") == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_further_signals_of_slurm_change_nothing(second: signal.Signals):
    stop = StopRequest(tells=False)
    with stop.listening():
        for number in (signal.SIGTERM, second, second):
            send(number)
    stop.agree(stop.votes())
    assert str(stop.end(3, 10)) == "stopped by SIGTERM"


def test_ctrl_c_that_is_meant_for_somebody_else_is_not_heard():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts a process with `&`
    stop = StopRequest()
    with stop.listening():
        send(signal.SIGINT)
        assert sum(stop.votes()) == 0


@pytest.mark.parametrize(("sent", "told"), [(signal.SIGTERM, "SIGTERM"), (None, "SIGUSR1")])
def test_end_that_all_ranks_know_of_gives_way_to_a_signal(sent: signal.Signals | None, told: str):
    stop = StopRequest(tells=False)
    with stop.listening():
        if sent is not None:
            send(sent)
    stop.agree(stop.votes())
    stop.ask_all(signal.SIGUSR1)
    assert str(stop.end(3, 10)) == f"stopped by {told}"


def test_training_that_ends_early_without_a_signal_is_told_in_a_sentence():
    stop = StopRequest()
    stop.agree(stop.votes())
    error = stop.end(3, 10)
    assert isinstance(error, PostTrainingError)
    assert error.problem == "the training ended by itself after step 3 of 10"
