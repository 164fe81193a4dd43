"""How Slurm says that jobs ended: `out_of_memory`, `cancelled by 1000`, `node_fail`, `preempted`, …

Its accounting knows of all jobs (sacct). A site without one has what the controller remembers, some
minutes (MinJobAge). A run's record says more, unless the run had no time left to write it.
"""

import re
from collections.abc import Collection, Iterator

from post_training.core.errors import PostTrainingError
from post_training.launch.queue import ask_slurm

# `77`, `77_2` and `77_[3-5]` of an array. Any other line is no answer of theirs.
_JOB = re.compile(r"(\d+)(?:_\S+)?\|(\S.*)")
_SUCCEEDED = "completed"
_OVER = (
    *(_SUCCEEDED, "failed", "cancelled", "timeout", "out_of_memory", "node_fail", "preempted"),
    *("boot_fail", "deadline", "revoked"),
)


def read_ended_jobs(job_ids: Collection[str]) -> dict[str, str]:
    """{job id: state, in lower case} of those that Slurm knows of and that are over.

    Of an array the first of its tasks that did not succeed counts.
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
    for line in filter(None, map(_JOB.fullmatch, said.splitlines())):
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
