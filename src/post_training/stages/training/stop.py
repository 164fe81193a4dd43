"""A training run that is asked to end writes a checkpoint first.

SIGTERM or SIGUSR1 is noted; the step at hand is finished, a checkpoint of it written, and the run
ends with 128 + the signal's number. So it takes one step, and an evaluation where one is due, and
one checkpoint. A further signal changes nothing: Slurm sends several. Ctrl-C ends the run at once;
it then goes on from an older checkpoint.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from post_training.core.errors import Interrupted

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """is_agreed: some rank got a signal, and all of them know."""

    def __init__(self) -> None:
        self._own: int | None = None
        self._agreed: int | None = None

    @property
    def is_agreed(self) -> bool:
        return self._agreed is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals within; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def votes(self) -> list[float]:
        """For each of SIGNALS, whether this rank got it: to be summed over the ranks."""
        return [float(number == self._own) for number in SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """votes: of all ranks. They hear of a signal in different steps; they have to end in the
        same one."""
        asked = [number for number, count in zip(SIGNALS, votes, strict=True) if count]
        self._agreed = asked[0] if asked else None

    def error(self) -> Interrupted:
        """What ends the run."""
        number = signal.Signals(self._agreed)
        return Interrupted(number.name, number)

    def _note(self, number: int, _frame: object) -> None:
        self._own = self._own or number
