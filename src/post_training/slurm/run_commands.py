"""What a person asks of submitted runs: the log of one, and the end of some."""

import os
from collections.abc import Sequence
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.records.run import LAUNCH_FOLDER
from post_training.slurm.queue import cancel, read_queue
from post_training.slurm.run_index import runs_below
from post_training.slurm.submit import submitted_jobs


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
