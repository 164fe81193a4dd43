"""A stage's step has failed: may the same job try again? Asked by the batch script (job.sh).

    stopped before the wall time, or by Slurm in the time of
      grace of a preempted job, with a new checkpoint         again, not counted
    stopped so, and nothing new                               again, counted
    killed by a signal, node, its memory, network, file system  again, counted
    anything else that a run says of itself                   final: it would fail the same way
    more than max_failures counted                            final

The count begins anew when a checkpoint, or a chunk, was written since the last failure. A worker of
an array has a record (RUN/workers/I) and a count of its own. This runs inside the image and not
with the login node's Python: what was submitted decides, and every site has it.

Where a node is suspected of a counted failure, the next attempt leaves it out if others are free.
srun and slurmstepd name it in the job's log:

    srun: error: Node failure on nid001
    srun: error: nid002: task 5: Killed           the first task that failed, of several nodes
    slurmstepd: error: Detected 1 oom_kill event  the node took the memory back
    slurmstepd: error: *** STEP 7.0 ON nid001 CANCELLED AT …   before any task failed: Slurm ended
                                                  it, as in the time of grace of a preempted job
"""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from post_training.core.errors import Interrupted, UsageError, report, tell
from post_training.core.files import read_json, write_json
from post_training.records.run import LAUNCH_FOLDER, is_live
from post_training.records.run_record import RECORD_NAME, read_record

SCHEMA = "post-training/failures/1"
TALLY_NAME = "failures.json"
# What our answer begins with on stdout, where an image's entrypoint may print a banner. It is what
# job.sh looks for.
MARK = "post-training-outcome: "
_LAST_BYTES = 1 << 20
# job.sh writes it before each attempt.
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
# A record's reason is `TypeName: message` for an exception that is not ours.
_LOST_CONNECTION = re.compile(
    r"(DistBackendError|DistNetworkError|DistStoreError|EngineDeadError): |"
    r"\b(NCCL|RCCL|[Gg]loo)\b|ECC error|Connection (reset|closed|refused)|Broken pipe"
)
# What torch's watchdog prints before it ends the process.
_COLLECTIVE_TIMEOUT = re.compile(r"Watchdog caught collective operation timeout")
_NO_RENDEZVOUS = ("FI_CXI_RDZV_GET_MIN", "FI_CXI_RDZV_THRESHOLD", "FI_CXI_RDZV_EAGER_SIZE")
# EIO, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOTCONN, ESHUTDOWN, ESTALE, EREMOTEIO: Lustre and NFS
# lose their servers so. A full disk or a missing file stays as it is.
_LOST_STORAGE = re.compile(r"\[Errno (5|104|107|108|110|113|116|121)\] ")


@dataclass(frozen=True)
class Tally:
    """The count of a run's failures, as failures.json keeps it.

    num_failures: counted since the last progress.
    num_attempts, checkpoint: how many attempts the record held, and how far the run had come, when
    it was last counted.
    asked, answer: of the attempt that was counted last; one whose answer got lost on its way asks
    again, and is not counted twice.
    """

    num_failures: int = 0
    num_attempts: int = 0
    checkpoint: str | None = None
    asked: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Step:
    """A step that ended.

    exit_code: srun's, not 0.
    attempts: of the run's record, all of them.
    checkpoint: how far the run is now (`_progress`).
    printed: by the attempt, into the job's log.
    nodes: of the job, as Slurm writes them: `nid[001-004]`.
    """

    exit_code: int
    attempts: Sequence[dict[str, Any]]
    checkpoint: str | None
    printed: str = ""
    nodes: str = ""


@dataclass(frozen=True)
class Verdict:
    """suspect: the node that the next attempt should not have."""

    again: bool
    reason: str
    tally: Tally
    suspect: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Print, after MARK, `again`, and the suspected node, or `stop`; say why on stderr; keep the
    count. With --start: `go` or `stop`. With --over-since: `over` or `on`."""
    # The wall time's warning goes to every step, and this one has to end by itself.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("max_failures", type=int)
    moment = parser.add_mutually_exclusive_group(required=True)
    moment.add_argument("--exit-code", type=int, help="of the stage's step")
    moment.add_argument("--start", action="store_true", help="may the next of a chain begin?")
    moment.add_argument("--over-since", type=int, help="has an attempt begun since, and ended?")
    parser.add_argument("--attempt", help="its name: asked again, the answer is the same")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args(arguments)
    record, name = options.run_dir, TALLY_NAME
    if options.worker is not None:
        record, name = record / f"workers/{options.worker}", f"failures-{options.worker}.json"
    if options.start:
        print(f"{MARK}{_start(_attempts(record))}")
        return 0
    if options.over_since is not None:
        print(f"{MARK}{'over' if _is_over(record, options.over_since) else 'on'}")
        return 0
    path = options.run_dir / LAUNCH_FOLDER / name
    tally = read_tally(path)
    if options.attempt is not None and tally.asked == options.attempt:
        print(f"{MARK}{tally.answer}")
        return 0
    step = Step(
        options.exit_code,
        _attempts(record),
        _progress(options.run_dir),
        last_attempt(options.log),
        os.environ.get("SLURM_JOB_NODELIST", ""),
    )
    verdict = judge(step, tally, options.max_failures)
    if advice := advise_on_timeout(step.printed, os.environ):
        tell(f"hint: {advice}")
    answer = f"again {verdict.suspect or ''}".strip() if verdict.again else "stop"
    counted = verdict.tally
    if options.attempt is not None:
        counted = replace(counted, asked=options.attempt, answer=answer)
    write_tally(path, counted)
    tell(f"{'trying again' if verdict.again else 'stopped'}: {verdict.reason}")
    print(f"{MARK}{answer}")
    return 0


def judge(step: Step, tally: Tally, max_failures: int) -> Verdict:
    """What follows a failed step; `reason` is one line for the log."""
    has_progressed = step.checkpoint != tally.checkpoint
    num_failures = 0 if has_progressed else tally.num_failures
    num_attempts = len(step.attempts)
    # A step that failed before it opened the run left no attempt of its own.
    attempt = step.attempts[-1] if num_attempts > tally.num_attempts else None

    def verdict(again: bool, reason: str, num_failures: int) -> Verdict:
        return Verdict(again, reason, Tally(num_failures, num_attempts, step.checkpoint))

    final = _final_reason(step, attempt)
    if final is not None:
        return verdict(False, final, num_failures)
    # Of what Slurm ended, no node is at fault.
    ended = _ended_by_slurm(step)
    if ended is not None and has_progressed:
        return verdict(True, f"{ended}, at {step.checkpoint}", 0)
    num_failures += 1
    passing = f"{ended}, without a new checkpoint" if ended else _passing_reason(step, attempt)
    suspect = None if ended else suspected_node(step.printed, step.nodes)
    reason = f"{passing}{f' (suspected: {suspect})' if suspect else ''}: failure {num_failures}"
    if num_failures > max_failures:
        return verdict(False, f"{reason}, and {max_failures} may be tried again", num_failures)
    again = verdict(True, f"{reason} of {max_failures} that may be tried again", num_failures)
    return replace(again, suspect=suspect)


def _ended_by_slurm(step: Step) -> str | None:
    """How, or None when the step ended by itself."""
    if step.exit_code == 128 + signal.SIGUSR1:
        return "stopped before the wall time"
    # Slurm also ends the ranks that outlive a dead one.
    if step.exit_code == 128 + signal.SIGTERM and was_cancelled(step.printed):
        return "stopped by Slurm"
    return None


def _final_reason(step: Step, attempt: dict[str, Any] | None) -> str | None:
    """Why it would fail the same way again, or None."""
    exit_code = step.exit_code
    if exit_code == UsageError.exit_code:
        return "the configuration or the command is wrong"
    if exit_code in (126, 127):
        return "the command cannot be started"
    # Whatever the exit code: srun's is the highest, of a rank that was only waiting for this one.
    if attempt is None or attempt["status"] != "failed" or was_out_of_memory(step.printed):
        return None
    reason = attempt["reason"]
    if _LOST_CONNECTION.search(reason) or _LOST_STORAGE.match(reason):
        return None
    return f"the run failed: {_first_line(reason)}"


def _passing_reason(step: Step, attempt: dict[str, Any] | None) -> str:
    exit_code = step.exit_code
    if was_out_of_memory(step.printed):
        return "killed for its memory by the node"
    if attempt is not None and attempt["status"] == "failed":
        return _first_line(attempt["reason"])
    if exit_code > 128:
        return f"killed by signal {exit_code - 128}"
    if attempt is None:
        return f"ended with exit code {exit_code} before the run was opened"
    return f"a rank other than the first ended with exit code {exit_code}"


def _first_line(reason: str) -> str:
    return reason.splitlines()[0]


def suspected_node(printed: str, job_nodes: str) -> str | None:
    """The node that may have made the attempt fail; None where nobody can tell.

    job_nodes: as Slurm writes them, `nid[001-004]`. Where nothing is printed, the one node of a job
    is the suspect, and of several nodes none is.
    """
    for pattern in (_NODE_FAILURE, _FAILED_TASK):
        if match := pattern.search(printed):
            return match[1]
    return job_nodes if job_nodes and not set(job_nodes) & set("[,") else None


def was_out_of_memory(printed: str) -> bool:
    """Whether the node, and not the program itself, ended a task for its memory."""
    return _OUT_OF_MEMORY.search(printed) is not None


def advise_on_timeout(printed: str, environment: Mapping[str, str]) -> str | None:
    """What to try where NCCL or RCCL waited in vain, on Slingshot; None for all else.

    environment: of the run's container. With the rendezvous protocol libfabric may lose a message:
    https://docs.cscs.ch/software/communication/nccl (hangs) names three settings.
    """
    is_slingshot = any(name.startswith("FI_CXI_") for name in environment)
    if not is_slingshot or not _COLLECTIVE_TIMEOUT.search(printed):
        return None
    if missing := [name for name in _NO_RENDEZVOUS if environment.get(name) != "0"]:
        words = ", ".join(f'{name} = "0"' for name in missing)
        return f"a collective timed out: try {words} in the [env] of an EDF of your own"
    return (
        "a collective timed out, and the settings of libfabric against hangs are all there: "
        "`submit --vet` looks for a bad node"
    )


def was_cancelled(printed: str) -> bool:
    """Whether Slurm ended the step before any of its tasks had ended by itself."""
    cancelled, failed = _CANCELLED.search(printed), _FAILED_TASK.search(printed)
    return cancelled is not None and (failed is None or cancelled.start() < failed.start())


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


def _start(attempts: Sequence[dict[str, Any]]) -> str:
    """`go`, or `stop` when the last attempt was cancelled: that is meant for all of a chain."""
    if attempts and attempts[-1]["reason"] == str(Interrupted("SIGTERM", signal.SIGTERM)):
        tell("stopped: the attempt before was cancelled")
        return "stop"
    return "go"


def _is_over(record: Path, since: int) -> bool:
    """since: seconds since 1970, by the clock of this node, which is that of the first rank."""
    attempts = _attempts(record)
    if not attempts or datetime.fromisoformat(attempts[-1]["started"]).timestamp() < since:
        return False
    return not is_live(record)


def current_tally(run_dir: Path) -> Tally:
    """No failures, and the attempts and the progress of a run that may not exist yet."""
    return Tally(0, len(_attempts(run_dir)), _progress(run_dir))


def read_tally(path: Path) -> Tally:
    try:
        record = read_json(path, SCHEMA)
    except FileNotFoundError:
        return Tally()
    return Tally(**{key: value for key, value in record.items() if key != "schema"})


def write_tally(path: Path, tally: Tally) -> None:
    write_json(path, {"schema": SCHEMA, **asdict(tally)})


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    return read_record(run_dir)["attempts"] if (run_dir / RECORD_NAME).exists() else []


def _progress(run_dir: Path) -> str | None:
    """The newest checkpoint, or the number of chunks that are done."""
    # Training stages name it there (train/checkpoint.py).
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "checkpoints/latest").read_text().strip()
    # A chunk's record is written last (annotate/work.py).
    num_chunks = sum(1 for _ in run_dir.glob("chunks/[0-9]*.json"))
    return f"chunk {num_chunks}" if num_chunks else None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))
