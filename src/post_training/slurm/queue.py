"""What Slurm says of its jobs, and what it is told: squeue, sacct, scontrol, scancel.

Its programs fail and hang while the controller is busy or restarted, so each is asked again a few
times. All see the cluster that sbatch submits to, whatever SLURM_* and SQUEUE_* the shell has; on
stdout only lines of the form that was asked for count: a site's wrapper may print others, and with
SLURM_CLUSTERS set squeue begins with `CLUSTER: name`.
"""

import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from post_training.core.errors import PostTrainingError, tell
from post_training.core.process import run_tool

_TIMEOUT_S = 60
# Somebody waits at a terminal; a job's script (job.sh) and `wait_for` have more patience.
_PAUSES_S = (0.5, 3)
_POLL_S = 5
_MOST_SILENT_POLLS = 120
_NO_ACCOUNTING = "accounting storage is disabled"  # sacct, at a site without
_PREFIXES = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCONTROL_", "SCANCEL_")
_JOB = re.compile(r"(\d+) ([A-Z_]+)(?: ([^|]*))?(?:\|(.*))?")
# `77`, `77_2` and `77_[3-5]` of an array. Any other line is no answer of theirs.
_ENDED_JOB = re.compile(r"(\d+)(?:_\S+)?\|(\S.*)")
_SUCCEEDED = "completed"
_OVER = (
    _SUCCEEDED,
    "failed",
    "cancelled",
    "timeout",
    "out_of_memory",
    "node_fail",
    "preempted",
    "boot_fail",
    "deadline",
    "revoked",
)


@dataclass(frozen=True)
class QueuedJob:
    """reason: Slurm's word for why it does not run; may be empty. script: the path of its own."""

    state: str
    reason: str
    script: str = ""


def slurm_environment() -> dict[str, str]:
    """Ours without what a shell within another job, or a person, has set for Slurm's programs."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(_PREFIXES)
    }


def ask_slurm(argv: Sequence[str]) -> str:
    """The stdout of one of Slurm's programs that may be run twice (so not of sbatch).

    Errors: PostTrainingError when it fails every time, or says that it always will.
    """
    pauses_s = [*_PAUSES_S] if shutil.which(argv[0]) else []
    while True:
        try:
            return run_tool(argv, env=slurm_environment(), timeout_s=_TIMEOUT_S)
        except PostTrainingError as error:
            if not pauses_s or _NO_ACCOUNTING in error.problem:
                raise
        time.sleep(pauses_s.pop(0))


def read_queue() -> dict[str, QueuedJob]:
    """All jobs in the queue by their id; of an array, the task that is listed first."""
    # All jobs are asked for: for one that is long gone squeue fails, as it does when Slurm is down.
    lines = ask_slurm(["squeue", "--noheader", "--format=%F %T %r|%o"]).splitlines()
    queue: dict[str, QueuedJob] = {}
    for match in filter(None, map(_JOB.fullmatch, lines)):
        job_id, state, reason, script = match.groups(default="")
        queue.setdefault(job_id, QueuedJob(state.lower(), reason.strip(), script))
    return queue


def wait_for(job_id: str) -> None:
    """Return when the job has left the queue, requeues and all.

    Errors: PostTrainingError when Slurm does not answer for long.
    """
    silent = 0
    while True:
        try:
            if job_id not in read_queue():
                return
            silent = 0
        except PostTrainingError:  # Its controller is busy, or restarted: it comes back.
            silent += 1
            if silent == _MOST_SILENT_POLLS:
                raise
        time.sleep(_POLL_S)


def cancel(job_ids: Sequence[str]) -> None:
    """Errors: PostTrainingError when Slurm does not answer."""
    ask_slurm(["scancel", *job_ids])


@contextmanager
def cancel_on_error(job_ids: list[str]) -> Iterator[None]:
    """While jobs are queued, one after another, `job_ids` holds those that are. An error ends them
    all, since nobody would know of them; what Slurm does not end is named on the screen."""
    try:
        yield
    except BaseException:
        if job_ids:
            try:
                cancel(job_ids)
            except PostTrainingError as error:
                stop = f"scancel {' '.join(job_ids)}"
                tell(f"warning: still queued, stop it by `{stop}`: {error.problem}")
        raise


def read_ended_jobs(job_ids: Collection[str]) -> dict[str, str]:
    """{job id: how it ended} of those that are over and that Slurm knows of: `out_of_memory`,
    `cancelled by 1000`, `node_fail`, `preempted`, …

    Of an array the first of its tasks that did not succeed counts. Slurm's accounting (sacct) knows
    of all jobs. A site without one has what the controller remembers, some minutes (MinJobAge).
    Errors: PostTrainingError when Slurm does not answer.
    """
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    try:
        said = "\n".join(
            ask_slurm([*command, f"--jobs={','.join(some)}"]) for some in _portions(sorted(job_ids))
        )
    except PostTrainingError:
        # `Slurm accounting storage is disabled`, and the exit code is 1 for any other reason too.
        # All jobs are asked for: for one that is long gone squeue fails.
        said = ask_slurm(["squeue", "--noheader", "--states=all", "--format=%i|%T"])
    states: dict[str, str] = {}
    for line in filter(None, map(_ENDED_JOB.fullmatch, said.splitlines())):
        job_id, state = line[1], line[2].lower()
        # `cancelled by 1000`: sacct adds who did it.
        is_over = state.split()[0] in _OVER
        if job_id in job_ids and is_over and states.get(job_id, _SUCCEEDED) == _SUCCEEDED:
            states[job_id] = state
    return states


def _portions(job_ids: list[str]) -> Iterator[list[str]]:
    """As many as a command line takes: one word of it has at most 128 KiB."""
    for start in range(0, len(job_ids), 5000):
        yield job_ids[start : start + 5000]
