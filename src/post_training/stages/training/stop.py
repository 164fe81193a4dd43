"""A training run that is asked to end writes a checkpoint first.

SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) is noted; the step at hand is finished, a checkpoint of it
written, and the run ends with 128 + the signal's number. So it takes one step, and an evaluation
where one is due, and one checkpoint. Further signals change nothing: Slurm sends several. Only a
second SIGINT ends the run at once; it then goes on from an older checkpoint.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from post_training.core.errors import Interrupted, PostTrainingError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """is_agreed: some rank got a signal, and all of them know. tells: whether this process says
    what it will do."""

    def __init__(self, tells: bool = True) -> None:
        self._tells = tells
        self._own: int | None = None
        self._agreed: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def is_agreed(self) -> bool:
        return self._agreed is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals within; afterwards they do what they did before."""
        # Ignored from the start is what a shell starts with `&`: Ctrl-C is meant for somebody else.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                if signal.getsignal(number) == self._note:  # else the run is being ended already
                    signal.signal(number, handler)

    def votes(self) -> list[float]:
        """For each of SIGNALS, whether this rank got it: to be summed over the ranks."""
        return [float(number == self._own) for number in SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """votes: of all ranks. They hear of a signal in different steps; they have to end in the
        same one."""
        asked = [number for number, count in zip(SIGNALS, votes, strict=True) if count]
        self._agreed = asked[0] if asked else None

    def end(self, step: int, num_steps: int) -> BaseException:
        """What ends a run that made `step` of `num_steps` steps."""
        if self._agreed is None:
            return PostTrainingError(
                f"the training ended by itself after step {step} of {num_steps}",
                hint="the same command goes on from there",
            )
        number = signal.Signals(self._agreed)
        return Interrupted(number.name, number)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT == self._own:
            self._before[number](number, frame)
        if self._own is None and self._tells:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            line = f"{name}: stopping after this step, with a checkpoint{again}\n"
            # print may be at work in this very moment, and can't be entered twice.
            os.write(2, line.encode())
        self._own = self._own or number
