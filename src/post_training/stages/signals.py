"""What ends a stage's process from without, and from within by a library: a run that is told so."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from post_training.core.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: of Slurm, before the wall time


def raise_on_signals() -> None:
    """SIGTERM, SIGUSR1 and Ctrl-C end the run in good order; a second Ctrl-C ends it at once.

    A stage that installs handlers of its own for a while (training: stop.py) puts these back.
    """

    def interrupt(number: int, _frame: object) -> NoReturn:
        ignore_signals()  # Once: the record is being closed now.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            # The kernel's own handler, for Python's waits where a file system hangs.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise Interrupted(signal.Signals(number).name, number)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    # Ignored from the start is what a shell starts with `&`: Ctrl-C is meant for somebody else.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def exits_are_failures() -> Iterator[None]:
    """A library that leaves by os._exit(0) in the middle of the work has not done it: to a script 0
    would be success, with a record that nobody closed. (sys.exit is an exception: __main__.py.)"""
    process, end = os.getpid(), os._exit

    def end_as_failed(code: int) -> NoReturn:
        # Forked children inherit this function.
        if code == 0 and os.getpid() == process:
            print("error: os._exit(0) was called within the stage", file=sys.stderr, flush=True)
            code = 1
        end(code)

    os._exit = end_as_failed
    try:
        yield
    finally:
        os._exit = end


def ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
