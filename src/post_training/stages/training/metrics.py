"""metrics.jsonl: one line each `logging_steps`, the same for a run that was killed and resumed.

    {"step": 10, "epoch": 0.5, "loss": 2.1, "grad_norm": 1.3, "learning_rate": 0.001,
     "num_tokens": 5120, "num_trained_tokens": 1830, "timing": {…}}

loss: mean over the steps since the line before of each step's loss, which is the mean over all
the trained tokens of its batch. grad_norm (before clipping) and learning_rate: this step's.
num_…: since the beginning, over all ranks, padding left out. Times and speeds are under `timing`
only.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.core.files import write_atomic


@dataclass
class Totals:
    """What has to outlive a stop: kept in each checkpoint. losses: since the last line."""

    num_tokens: int = 0
    num_trained_tokens: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Figures of one optimizer step, over all ranks."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_trained_tokens: int


class Metrics:
    """Counts on every rank, writes on rank 0 (`path` is None on the others)."""

    def __init__(self, path: Path | None, logging_steps: int):
        self.path = path
        self.logging_steps = logging_steps
        self.totals = Totals()
        self.last: dict[str, Any] = {}
        self._line_at = time.monotonic()
        self._tokens_at_line = 0

    def resume(self, step: int, totals: Totals) -> None:
        """Continue after `step`: what was written later will be written again."""
        self.totals = totals
        self._tokens_at_line = totals.num_tokens
        if self.path is None:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if (known := _step_of(line)) is not None and known <= step]
        write_atomic(self.path, "".join(f"{line}\n" for line in kept))
        self.last = json.loads(kept[-1]) if kept else {}

    def add(self, step: Step, *, last: bool) -> dict[str, Any] | None:
        """Count `step`; return the line it completes, if it does. last: the run ends here."""
        totals = self.totals
        totals.num_tokens += step.num_tokens
        totals.num_trained_tokens += step.num_trained_tokens
        totals.losses.append(step.loss)
        if step.step % self.logging_steps and not last:
            return None
        now = time.monotonic()
        seconds = now - self._line_at
        line = {
            "step": step.step,
            "epoch": step.epoch,
            "loss": sum(totals.losses) / len(totals.losses),
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
            "num_tokens": totals.num_tokens,
            "num_trained_tokens": totals.num_trained_tokens,
            "timing": {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "step_s": round(seconds / len(totals.losses), 4),
                "tokens_per_s": round((totals.num_tokens - self._tokens_at_line) / seconds, 1),
            },
        }
        totals.losses.clear()
        self._line_at, self._tokens_at_line = now, totals.num_tokens
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                # A checkpoint must never know more than this file.
                os.fsync(file.fileno())
        self.last = line
        return line


def _step_of(line: str) -> int | None:
    """The line's step; None for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
