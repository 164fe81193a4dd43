"""A training run that is asked to end writes a checkpoint first.

SIGTERM or SIGUSR1 is noted; the step at hand is finished, a checkpoint of it written, and the run
ends with 128 + the signal's number. So it takes one step, and an evaluation where one is due, and
one checkpoint. A further signal changes nothing: Slurm sends several. Ctrl-C ends the run at once;
it then goes on from an older checkpoint.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from post_training.core.errors import Interrupted

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """is_asked: this process got a signal. is_agreed: some rank did, and all of them know."""

    def __init__(self) -> None:
        self.is_agreed = False
        self._number: int | None = None

    @property
    def is_asked(self) -> bool:
        return self._number is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals within; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def error(self) -> Interrupted:
        """What ends the run. The signal may have come to another rank only."""
        number = signal.Signals(self._number or signal.SIGTERM)
        return Interrupted(number.name, number)

    def _note(self, number: int, _frame: object) -> None:
        self._number = self._number or number
