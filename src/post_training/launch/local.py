"""Start one process per local device when no launcher did, and end together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from post_training.core.process import dies_with
from post_training.launch.ranks import Launch

_GRACE_S = 20
# A rank that has done its work ends with this code instead of 0, which is that of a library's own
# _exit(0) in the middle of it; the rank itself can say nothing then.
DONE_VARIABLE, _DONE = "POST_TRAINING_EXIT_CODE_OF_SUCCESS", 77


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
            print("error: a rank ended with exit code 0 before its work was done", file=sys.stderr)
            code = 1
        if code != _DONE and first_failure == 0:
            first_failure = 128 - code if code < 0 else code
            end(signal.SIGTERM)
    signal.alarm(0)
    return first_failure


def _wait_any(processes: list[subprocess.Popen]) -> int:
    """The return code of the next of our processes that ends."""
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
