"""Checkpoints that are complete or absent, and the signals that ask for one.

All ranks write into `.saving`; when the last one is done, rank 0 renames the folder to
`checkpoint-N`. So a run killed at any moment finds only complete checkpoints, and resumes from the
newest, whose bytes are compared first (checksums.py). `trainer_state.json` must be in each: one
copied here by hand in part is left out too.

`latest` names the newest. When it is there and that checkpoint is not, somebody took it away: the
run is not silently begun again; nor is one whose steps.jsonl tells of more steps than a checkpoint
is written after. To begin from weights, give them as model.path of another run.
"""

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import Interrupted, PostTrainingError, UsageError
from post_training.core.files import remove_leftovers, sync, sync_folder, write_atomic

MARKER = "trainer_state.json"
LATEST = "latest"
INFERENCE_CHECKPOINTS = "inference_checkpoints"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Checkpoints:
    """The folder `checkpoints/` of a run. Its methods are for rank 0 alone."""

    def __init__(self, folder: Path, limit: int | None):
        self.folder = folder
        self.limit = limit
        self.staging = folder / ".saving"

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(
            int(marker.parent.name.removeprefix("checkpoint-"))
            for marker in self.folder.glob(f"checkpoint-*/{MARKER}")
        )

    def tidy(self) -> int | None:
        """Remove what a killed run left half-done; return the step to resume from.

        Errors: UsageError when the checkpoint that `latest` names, or a newer one, is not there.
        """
        self._check_latest()
        self.drop_staged()
        remove_leftovers(self.folder, LATEST)
        steps = self.steps()
        complete = {self.path(step) for step in steps}
        for folder in self.folder.glob("checkpoint-*"):
            if folder not in complete:
                shutil.rmtree(folder)
        self._rotate()
        return steps[-1] if steps else None

    def publish(self, staged: Path, step: int) -> None:
        """Make the staged folder the complete checkpoint of `step`, then drop the oldest."""
        sync_folder(staged)
        staged.rename(self.path(step))
        sync(self.folder)
        write_atomic(self.folder / LATEST, f"{self.path(step).name}\n")
        shutil.rmtree(self.staging)
        self._rotate()

    def drop_staged(self) -> None:
        """Remove what was half-written. Any rank may call it: the one whose disk is full."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _check_latest(self) -> None:
        file = self.folder / LATEST
        if not file.exists():
            return
        name = file.read_text().strip()
        step = int(name.removeprefix("checkpoint-"))
        if not any(known >= step for known in self.steps()):
            raise UsageError(
                f"the newest checkpoint is {name}, and it is missing or incomplete",
                where=str(file),
                hint="bring it back; or remove this file to go on from an older one, or else "
                "from the beginning",
            )

    def _rotate(self) -> None:
        if self.limit is not None:
            for step in self.steps()[: -self.limit]:
                # The marker first: a removal cut short must not look complete.
                (self.path(step) / MARKER).unlink()
                shutil.rmtree(self.path(step))


def open_inference_checkpoints(run_dir: Path, elsewhere: Path | None) -> None:
    """Make ready for models for inference along the way: RUN/inference_checkpoints/step-N.

    Make RUN/inference_checkpoints a link to `elsewhere`, if that is given, and remove what a
    killed attempt left half-written there. For rank 0 alone.

    Errors: UsageError when that folder holds something already, or the run's own is another one.
    """
    folder = run_dir / INFERENCE_CHECKPOINTS
    if elsewhere is not None:
        _link(folder, elsewhere.absolute())
    remove_leftovers(folder, "*")


def _link(folder: Path, place: Path) -> None:
    where = "checkpointing.inference_checkpoint_path"
    if folder.is_dir():
        if folder.resolve() != place.resolve():
            raise UsageError(f"this run has them in {folder.resolve()} (got {place})", where=where)
        return
    place.mkdir(parents=True, exist_ok=True)
    if held := next(place.iterdir(), None):
        problem = f"{place} holds {held.name} already, which is none of this run's"
        raise UsageError(problem, where=where, hint="give each run a folder of its own")
    folder.unlink(missing_ok=True)  # a link to a folder that was taken away
    folder.symlink_to(place)


class StopRequest:
    """A training run that is asked to end writes a checkpoint first.

    SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) is noted; the step at hand is finished, a checkpoint of it
    written, and the run ends with 128 + the signal's number. So it takes one step, and an
    evaluation where one is due, and one checkpoint. Further signals change nothing: Slurm sends
    several. Only a second SIGINT ends the run at once; it then goes on from an older checkpoint.

    tells: whether this process says what it will do.
    is_agreed: some rank got a signal, and all of them know.
    """

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

    def ask_all(self, number: int) -> None:
        """As though every rank had got this signal, where none has got one: for an end that all of
        them know of. A job that is cancelled at that very step must not be queued again."""
        self._agreed = self._agreed or number

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
