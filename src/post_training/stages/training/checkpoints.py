"""Checkpoints that are complete or absent.

All ranks write into `.saving`; when the last one is done, rank 0 renames the folder to
`checkpoint-N`. So a run killed at any moment finds only complete checkpoints, and resumes from the
newest, whose bytes are compared first (checksums.py). `trainer_state.json` must be in each: one
copied here by hand in part is left out too.

`latest` names the newest. When it is there and that checkpoint is not, somebody took it away: the
run is not silently begun again; nor is one whose steps.jsonl tells of more steps than a checkpoint
is written after. To begin from weights, give them as model.path of another run.
"""

import shutil
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.core.files import sync, sync_folder, write_atomic
from post_training.stages.leftovers import remove_leftovers

MARKER = "trainer_state.json"
LATEST = "latest"


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

    def publish(self, step: int) -> None:
        """Make the staged checkpoint of `step` a complete one, then drop the oldest."""
        staged = self.staging / f"checkpoint-{step}"
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
