"""The processes of a run: which rank this one is, ranks that are started here, and how they end.

A launcher says this process's rank: torch's variables, Slurm's, or none. Where there is none, one
process per device is started here (run_local_ranks). SIGTERM, SIGUSR1 (of Slurm, before the wall
time) and Ctrl-C end a run in good order.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from post_training.core.errors import Interrupted, UsageError, tell
from post_training.core.process import dies_with

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_FIRST_PORT, _NUM_PORTS = 20000, 20000
_GRACE_S = 20
# A rank that has done its work ends with this code instead of 0, which is that of a library's own
# _exit(0) in the middle of it; the rank itself can say nothing then.
DONE_VARIABLE, _DONE = "POST_TRAINING_EXIT_CODE_OF_SUCCESS", 77
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Launch:
    """One process of a job, as its launcher started it. rendezvous: where rank 0 listens, as
    `host:port`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str

    def variables(self) -> dict[str, str]:
        """The variables that torch.distributed and accelerate read."""
        address, port = self.rendezvous.rsplit(":", 1)
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }


def detect_launch(environment: Mapping[str, str]) -> Launch | None:
    """The launch that `environment` describes, or None when nobody started several processes.

    torchrun's variables count before Slurm's: torchrun itself may run in a Slurm step. A batch
    script is no step: Slurm sets SLURM_NTASKS there, but only one process runs.
    Errors: UsageError when the variables are incomplete.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size, local_rank, local_size = _integers(environment, TORCH_VARIABLES)
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        return Launch(
            rank, world_size, local_rank, local_size, f"{address}:{environment['MASTER_PORT']}"
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return None
    rank, world_size, local_rank, node = _integers(
        environment, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
    )
    local_size = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
    # Steps of one job may run side by side, so the port is of the step.
    job, step = _integers(environment, ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _FIRST_PORT + (job * 16 + step) % _NUM_PORTS
    # On one node its name need not resolve, as it does not in a test cluster.
    is_alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    host = "127.0.0.1" if is_alone else first_host(environment["SLURM_STEP_NODELIST"])
    return Launch(rank, world_size, local_rank, local_size, f"{host}:{port}")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `4(x2),3` as [4, 4, 3]."""
    counts: list[int] = []
    for word in text.split(","):
        count, _, repeat = word.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first node of Slurm's `nid[001-004,7],login1`: nid001."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    inside, _, suffix = rest.partition("]")
    first = inside.replace("-", ",").split(",")[0]
    return f"{prefix}{first}{suffix.split(',')[0]}"


def _integers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the launcher's variables are incomplete: {error}",
            hint=f"a launcher sets all of {', '.join(names)}",
        ) from None


def run_local_ranks(command: Sequence[str], num_processes: int) -> int:
    """Run `command` once per rank; 0, or the exit code of the first process that failed. A rank
    that succeeds ends with the code that its variable DONE_VARIABLE has.

    SIGTERM, SIGUSR1 and Ctrl-C to this process go to every rank, which may take its time: training
    writes a checkpoint. When a rank fails, or another signal comes, the others get SIGTERM, and
    SIGKILL after 20 s: no rank waits for a dead one. A second Ctrl-C they get as what it is.
    """
    rendezvous = f"127.0.0.1:{_free_port()}"
    processes: list[subprocess.Popen] = []
    stopping = False

    def forward(number: int, _frame: object = None) -> None:
        nonlocal stopping
        if stopping:
            end(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        else:
            stopping = True
            send(number)

    def end(number: int) -> None:
        send(number)
        signal.alarm(_GRACE_S)

    def send(number: int) -> None:
        for process in processes:
            # Popen.send_signal would reap the process, and the wait below would miss its end.
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    # Ignored from the start is what a shell starts with `&`: Ctrl-C is meant for somebody else.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    for rank in range(num_processes):
        launch = Launch(rank, num_processes, rank, num_processes, rendezvous)
        processes.append(
            # A session of its own: Ctrl-C reaches the ranks once, through us.
            subprocess.Popen(
                command,
                # They are all here: gloo need not find out which address the host name has.
                env={
                    "GLOO_SOCKET_IFNAME": "lo",
                    **os.environ,
                    **launch.variables(),
                    DONE_VARIABLE: str(_DONE),
                },
                start_new_session=True,
                preexec_fn=dies_with(os.getpid()),
            )
        )
    first_failure = 0
    for _ in processes:
        code = _wait_any(processes)
        if code == 0 and first_failure == 0:
            tell("error: a rank ended with exit code 0 before its work was done")
            code = 1
        if code != _DONE and first_failure == 0:
            first_failure = 128 - code if code < 0 else code
            end(signal.SIGTERM)
    signal.alarm(0)
    return first_failure


def _wait_any(processes: list[subprocess.Popen]) -> int:
    """Wait for the next of our processes that ends; its return code."""
    while True:
        pid, status = os.waitpid(-1, 0)
        for process in processes:
            if process.pid == pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def raise_on_signals() -> None:
    """SIGTERM, SIGUSR1 and Ctrl-C end the run in good order; a second Ctrl-C ends it at once.

    A stage that installs handlers of its own for a while (train/checkpoint.py) puts these back.
    """

    def interrupt(number: int, _frame: object) -> NoReturn:
        ignore_signals()  # Once: the record is being closed now.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            # The kernel's own handler, for Python's waits where a file system hangs.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise Interrupted(signal.Signals(number).name, number)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    # Ignored from the start is what a shell starts with `&`: Ctrl-C is meant for somebody else.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def ignore_signals() -> None:
    """From here on SIGTERM and SIGUSR1 change nothing: what is left takes moments."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def exits_are_failures() -> Iterator[None]:
    """A library that leaves by os._exit(0) in the middle of the work has not done it: to a script 0
    would be success, with a record that nobody closed. (sys.exit is an exception: __main__.py.)"""
    process, end = os.getpid(), os._exit

    def end_as_failed(code: int) -> NoReturn:
        # Forked children inherit this function.
        if code == 0 and os.getpid() == process:
            tell("error: os._exit(0) was called within the stage")
            code = 1
        end(code)

    os._exit = end_as_failed
    try:
        yield
    finally:
        os._exit = end
