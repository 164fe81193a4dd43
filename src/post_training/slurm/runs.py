"""How a run is doing: from its record, its metrics, and Slurm's queue where there is one.

waiting    in the queue, for other jobs         running      at work
queued     in the queue                         finished     its artifacts are there
failed, interrupted, killed, ended              over, and not finished
not started                                     unknown      at work or killed: nobody can tell

Of a run that is over without a reason of its own, Slurm is asked how its job ended.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.records.run import LAUNCH_FOLDER, is_live
from post_training.records.run_record import METRICS_NAME, RECORD_NAME, read_record, record_faults
from post_training.report.curves import read_losses
from post_training.slurm.outcome import TALLY_NAME, read_tally
from post_training.slurm.queue import QueuedJob, read_ended_jobs, read_queue
from post_training.slurm.submit import submitted_jobs

STATES = (
    "waiting",
    "queued",
    "running",
    "finished",
    "failed",
    "interrupted",
    "killed",
    "ended",
    "not started",
    "unknown",
)
_LENGTHS = {
    # What a training run is as long as, and how far it is by the figures of a metrics line.
    "training.max_steps": "step",
    "training.num_train_epochs": "epoch",
    "training.num_training_samples": "num_sequences",
    "training.num_training_tokens": "num_tokens",
}
_TAIL_BYTES = 1 << 16
_UNEXPLAINED = ("interrupted", "killed", "ended")
_RUNNING = ("running", "completing", "configuring", "stopped", "suspended")


@dataclass(frozen=True)
class RunState:
    """How a run is doing.

    reason: why it is so; of a run that waits, why its last attempt ended.
    job_ids: of its last submission, the job itself first.
    attempts: status and reason of each.
    num_failures: counted since the last progress.
    slurm_state: how Slurm says that the last attempt's job ended, where the run could not say all.
    done: the share of the whole, 0 to 1.
    step, loss, tokens_per_s: of the last line of its metrics.
    losses: of lines evenly spaced over the run.
    time_left_s: at the speed of that line.
    """

    run_dir: Path
    stage: str | None
    state: str
    reason: str | None
    job_ids: list[str]
    attempts: list[dict[str, Any]]
    num_failures: int
    slurm_state: str | None = None
    done: float | None = None
    step: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    time_left_s: float | None = None
    losses: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "run_dir": str(self.run_dir)}


def read_queue_of(run_dirs: Iterable[Path]) -> dict[str, QueuedJob]:
    """Slurm's queue, where any of the runs was submitted. Errors: PostTrainingError."""
    return read_queue() if any(map(submitted_jobs, run_dirs)) else {}


def queue_if_it_answers(run_dirs: Iterable[Path]) -> dict[str, QueuedJob]:
    """Slurm's queue, and empty with a warning when Slurm does not answer."""
    try:
        return read_queue_of(run_dirs)
    except PostTrainingError as error:
        tell(f"warning: Slurm does not answer ({error.problem.splitlines()[0]})")
        return {}


def run_states(run_dirs: Sequence[Path]) -> list[RunState]:
    """The states of these runs; where Slurm does not answer, what the records say."""
    queue = queue_if_it_answers(run_dirs)
    return add_slurm_states([run_state(run_dir, queue) for run_dir in run_dirs])


def add_slurm_states(states: Sequence[RunState]) -> list[RunState]:
    """Ask Slurm how the jobs ended of those that are over without a reason of their own."""
    jobs = [_last_job(state) if state.state in _UNEXPLAINED else None for state in states]
    ended: dict[str, str] = {}
    if wanted := {job_id for job_id in jobs if job_id}:
        # Where Slurm does not answer, `queue_if_it_answers` has said so.
        with contextlib.suppress(PostTrainingError):
            ended = read_ended_jobs(wanted)
    return [
        replace(state, slurm_state=ended.get(job_id or ""))
        for state, job_id in zip(states, jobs, strict=True)
    ]


def _last_job(state: RunState) -> str | None:
    """The job of the last attempt; of a run that was never opened, the job that should have."""
    if not state.job_ids:
        return None
    last = state.attempts[-1]["scheduler_job"] if state.attempts else None
    # `77.0`, or `77_2.0` of an array.
    job_id = re.split(r"[._]", last)[0] if last else None
    return job_id if job_id in state.job_ids else state.job_ids[0]


def run_state(run_dir: Path, queue: Mapping[str, QueuedJob]) -> RunState:
    """Read how a run is doing. queue: Slurm's jobs by their id.

    Errors: UsageError for a record that is none any more.
    """
    try:
        return _run_state(run_dir, queue)
    except (LookupError, TypeError, AttributeError):
        raise UsageError(
            "no record any more: parts of it are gone or damaged", where=str(run_dir / RECORD_NAME)
        ) from None


def _run_state(run_dir: Path, queue: Mapping[str, QueuedJob]) -> RunState:
    record = read_record(run_dir) if (run_dir / RECORD_NAME).exists() else None
    job_ids = submitted_jobs(run_dir)
    state, reason = _state(run_dir, record, [queue[i] for i in job_ids if i in queue], job_ids)
    return RunState(
        run_dir,
        record and record["stage"],
        state,
        reason,
        job_ids,
        [
            {key: attempt[key] for key in ("status", "reason", "started", "ended", "scheduler_job")}
            for attempt in (record["attempts"] if record else [])
        ],
        read_tally(run_dir / LAUNCH_FOLDER / TALLY_NAME).num_failures,
        **_progress(run_dir, record or {"recipe": {}}, state),
    )


def _state(
    run_dir: Path, record: dict[str, Any] | None, queued: list[QueuedJob], job_ids: list[str]
) -> tuple[str, str | None]:
    status, reason = (record["status"], record["reason"]) if record else (None, None)
    if status == "finished":
        return "finished", next(iter(record_faults(record or {})), None)
    if any(job.state in _RUNNING for job in queued):
        return "running", None
    try:
        if is_live(run_dir):
            return "running", None
    except (UsageError, OSError) as error:
        # No locks on this file system, or somebody else's folder. A closed record needs no lock.
        if not queued and status in (None, "running"):
            return "unknown", str(error).splitlines()[0]
    if queued:
        waits = all(job.reason.startswith("Dependency") for job in queued)
        last = reason or (status and "killed")
        return ("waiting" if waits else "queued"), last or None
    if status == "running":
        return "killed", "its record was never closed"
    if status is not None:
        return status, reason
    if job_ids:
        log = run_dir / LAUNCH_FOLDER / f"slurm-{job_ids[0]}.out"
        return "ended", f"before the run was opened; {'see ' if log.exists() else 'no '}{log}"
    return "not started", None


def _progress(run_dir: Path, record: dict[str, Any], state: str) -> dict[str, Any]:
    line = _last_line(run_dir / METRICS_NAME)
    if line is None:
        return {"done": 1.0 if state == "finished" else _share_of_chunks(run_dir)}
    timing = line.get("timing", {})
    found = {"step": line["step"], "loss": line["loss"], "tokens_per_s": timing.get("tokens_per_s")}
    found["losses"] = read_losses(run_dir)
    if state == "finished":
        return {**found, "done": 1.0}
    for setting, figure in _LENGTHS.items():
        if (length := record["recipe"].get(setting)) and line.get(figure):
            # The numbers of steps may count on from those of an earlier training.
            num_made = line["step"] - record["recipe"].get("training.iteration_offset", 0)
            found["done"] = min(1.0, (num_made if figure == "step" else line[figure]) / length)
            if (step_s := timing.get("step_s")) is not None and state == "running":
                remaining = num_made / found["done"] - num_made
                found["time_left_s"] = round(remaining * step_s, 1)
    return found


def _share_of_chunks(run_dir: Path) -> float | None:
    """Of a stage that is done in chunks (annotate/)."""
    try:
        manifest = json.loads((run_dir / "chunks/manifest.json").read_text())
        num_chunks = len(manifest["chunks"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None  # Not begun; or damaged, which the run itself will say.
    num_done = sum(1 for _ in run_dir.glob("chunks/[0-9]*.json"))
    return num_done / max(1, num_chunks)


def _last_line(path: Path) -> dict[str, Any] | None:
    """The newest whole line with a loss; evaluations have lines of their own."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for text in reversed(lines):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and {"loss", "step"} <= line.keys():
                return line
    return None
