"""Real signals to real processes."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from post_training.core.errors import Interrupted, report
from post_training.stages.processes import raise_on_signals

raise_on_signals()
try:
    print("ready", flush=True)
    while True:
        signal.pause()
except Interrupted as error:
    print("closing", flush=True)
    for line in sys.stdin:
        print(line, end="", flush=True)
    sys.exit(report(error))
"""


@pytest.fixture
def start():
    """A process that takes its time to close what it has open; sigint: set for it at its start."""
    processes = []

    def start(sigint: int = signal.SIG_DFL) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_signal_interrupts_and_further_ones_of_slurm_change_nothing(start, number, code):
    process = start()
    process.send_signal(number)
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate("still here\n")[0] == "still here\n"
    assert process.returncode == code


def test_ctrl_c_while_a_run_is_closed_ends_it_at_once(start):
    process = start()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT


def test_ctrl_c_that_is_ignored_from_the_start_stays_ignored(start):
    process = start(signal.SIG_IGN)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "closing\n"
    process.communicate()
    assert process.returncode == 143
