"""What a person asks of runs in the queue: their log, their end, and a table of their states."""

import os
from collections.abc import Sequence
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.records.run import LAUNCH_FOLDER
from post_training.slurm.queue import cancel, read_queue
from post_training.slurm.run_index import runs_below
from post_training.slurm.runs import RunState
from post_training.slurm.submit import submitted_jobs

HEADER = ["state", "job", "attempts", "done", "loss", "tokens/s", "time left", "why"]


def find_log(run_dir: Path, *, worker: int | None, may_come: bool) -> Path:
    """The file with what the run's newest job printed, all its attempts.

    worker: of this worker of an array. may_come: the job need not have started.
    Errors: UsageError without a log.
    """
    job_ids = submitted_jobs(run_dir)
    if not job_ids:
        raise UsageError(
            "no log: the run was not submitted, and its words went to its terminal",
            where=str(run_dir),
        )
    folder = run_dir / LAUNCH_FOLDER
    if worker is None:
        started = [path for i in job_ids if (path := folder / f"slurm-{i}.out").exists()]
        path = max(started, key=os.path.getmtime, default=folder / f"slurm-{job_ids[0]}.out")
    elif not (folder / "workers.sh").exists():
        raise UsageError("the run has no workers", where=str(run_dir))
    else:
        path = folder / f"slurm-{job_ids[1]}_{worker}.out"
    if not path.exists() and not may_come:
        raise UsageError("not there: the job has not started", where=str(path))
    return path


def cancel_runs(folders: Sequence[Path]) -> dict[Path, list[str]]:
    """Stop the jobs of these runs, and of all runs below these folders, for good; {run: its jobs}.

    Errors: UsageError when none of them is in the queue.
    """
    run_dirs = [run_dir for folder in folders for run_dir in runs_below(folder)]
    submitted = {run_dir: submitted_jobs(run_dir) for run_dir in run_dirs}
    queue = read_queue() if any(submitted.values()) else {}
    # The last to run first: what waits for a cancelled job must not start.
    queued = {
        run_dir: [job_id for job_id in job_ids if job_id in queue]
        for run_dir, job_ids in submitted.items()
    }
    job_ids = [job_id for ids in queued.values() for job_id in ids]
    if not job_ids:
        raise UsageError(
            "no job of it is in Slurm's queue",
            where=", ".join(map(str, folders)),
            hint="a run without Slurm is stopped where it runs, with Ctrl-C or SIGTERM",
        )
    cancel(sorted(job_ids, key=int, reverse=True))
    return {run_dir: ids for run_dir, ids in queued.items() if ids}


def cells(state: RunState) -> list[str]:
    """The state under `HEADER`; what is not known is empty."""
    done = "" if state.done is None else f"{state.done:.0%}"
    if state.step is not None:
        done = f"{done} (step {state.step})".lstrip()
    attempts = str(len(state.attempts) or "")
    if state.num_failures:
        attempts += f" ({state.num_failures} failed)"
    why = state.reason.splitlines()[0] if state.reason else ""
    if state.slurm_state:
        why = f"{why} (Slurm: {state.slurm_state})".lstrip()
    return [
        state.state,
        state.job_ids[0] if state.job_ids else "",
        attempts,
        done,
        "" if state.loss is None else f"{state.loss:.4g}",
        "" if state.tokens_per_s is None else f"{state.tokens_per_s:,.0f}",
        "" if state.time_left_s is None else duration(state.time_left_s),
        why,
    ]


def duration(seconds: float) -> str:
    """`3 h 20 min`, `45 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min" if whole >= 60 else f"{whole} s"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they have to be; the last one ends where it ends."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )
