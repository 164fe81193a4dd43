"""Which node may have made an attempt fail, from what srun and slurmstepd wrote into the job's log.

    srun: error: Node failure on nid001
    srun: error: nid002: task 5: Killed           the first task that failed, of several nodes
    slurmstepd: error: Detected 1 oom_kill event  the node took the memory back
    slurmstepd: error: *** STEP 7.0 ON nid001 CANCELLED AT …   before any task failed: Slurm ended
                                                  it, as in the time of grace of a preempted job

The name is for the next attempt, which leaves the node out where others are free. Where nothing is
said, the one node of a job is the suspect, and of several nodes none is.
"""

import re
from pathlib import Path

_LAST_BYTES = 1 << 20
# launch/script.py writes it before each attempt.
_START_OF_ATTEMPT = re.compile(r"^attempt \d+ of job \S+, on ", re.MULTILINE)
_NODE_FAILURE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
_FAILED_TASK = re.compile(r"^srun: error: ([^\s:]+): tasks? [^\s:]+: ", re.MULTILINE)
# By cgroups, and where Slurm itself watches (OverMemoryKill). Of several slurmd on one machine each
# adds its node's name to `slurmstepd`.
_OUT_OF_MEMORY = re.compile(
    r"^slurmstepd\S*: error: .*(oom[-_ ]kill|exceeded memory limit)|"
    r"^srun: error: \S+: tasks? \S+: Out Of Memory",
    re.MULTILINE | re.IGNORECASE,
)
_CANCELLED = re.compile(
    r"^slurmstepd\S*: error: \*\*\* STEP \S+ ON \S+ CANCELLED AT ", re.MULTILINE
)


def last_attempt(log: Path) -> str:
    """What the last attempt printed; of a long log, its end. Empty without a log."""
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    starts = [match.start() for match in _START_OF_ATTEMPT.finditer(text)]
    return text[starts[-1] :] if starts else text


def suspected_node(printed: str, job_nodes: str) -> str | None:
    """job_nodes: as Slurm writes them, `nid[001-004]`."""
    for pattern in (_NODE_FAILURE, _FAILED_TASK):
        if match := pattern.search(printed):
            return match[1]
    return job_nodes if job_nodes and not set(job_nodes) & set("[,") else None


def was_out_of_memory(printed: str) -> bool:
    return _OUT_OF_MEMORY.search(printed) is not None


def was_cancelled(printed: str) -> bool:
    """Whether Slurm ended the step before any of its tasks had ended by itself."""
    cancelled, failed = _CANCELLED.search(printed), _FAILED_TASK.search(printed)
    return cancelled is not None and (failed is None or cancelled.start() < failed.start())
