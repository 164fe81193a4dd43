"""Ranks, as a launcher's variables say them or started here; and what signals do to them.

Signal handlers are set, so what sets them runs in real processes of its own.
"""

import signal
import subprocess
import sys
from subprocess import Popen

import pytest

from post_training.core.errors import UsageError
from post_training.stages.processes import (
    DONE_VARIABLE,
    Launch,
    detect_launch,
    first_host,
    tasks_per_node,
)

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,1",
    "SLURM_STEP_NODELIST": "nid[003-004]",
}


def test_detect_launch_nothing_started_us_is_none():
    assert detect_launch({}) is None


def test_detect_launch_slurm_step_gives_the_rank():
    assert detect_launch(STEP) == Launch(4, 5, 0, 1, f"nid003:{20000 + 7 * 16 + 2}")


def test_detect_launch_step_on_one_node_meets_on_the_loopback_address():
    step = {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5"}
    launch = detect_launch({**step, "SLURM_NODEID": "0"})
    assert launch == Launch(4, 5, 0, 5, f"127.0.0.1:{20000 + 7 * 16 + 2}")


def test_detect_launch_batch_script_is_one_process():
    assert detect_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None


def test_detect_launch_torchrun_inside_a_step_wins():
    torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "29500",
    }
    assert detect_launch({**STEP, **torchrun}) == Launch(1, 2, 1, 2, "host:29500")


def test_detect_launch_round_trips_through_its_variables():
    launch = Launch(3, 8, 1, 2, "10.0.0.1:1234")
    assert detect_launch(launch.variables()) == launch


def test_detect_launch_incomplete_variables_are_refused():
    with pytest.raises(UsageError, match="the launcher's variables are incomplete"):
        detect_launch({"RANK": "1"})


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x3)", [1, 2, 2, 2])]
)
def test_tasks_per_node_is_expanded(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("host", "host"),
        ("a,b", "a"),
        ("nid[003-004,7]", "nid003"),
        ("nid[7,9],x", "nid7"),
        ("x,nid[1-2]", "x"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


LAUNCHER = """
import sys
from post_training.stages.processes import run_local_ranks
sys.exit(run_local_ranks([sys.executable, "-c", sys.argv[2]], int(sys.argv[1])))
"""

# What a rank's entrypoint does at its end (stages/__main__.py).
DONE = f"os._exit(int(os.environ[{DONE_VARIABLE!r}]))"


def launch(
    script: str, num_processes: int = 2, *, sigint: int = signal.SIG_DFL, stderr: int | None = None
) -> Popen[str]:
    """sigint: what the process finds set for it when it begins."""
    return Popen(
        [sys.executable, "-c", LAUNCHER, str(num_processes), script],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )


def test_run_local_ranks_gives_every_rank_its_variables():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]
    # One write a process, so that lines don't mix.
    script = f"import os; os.write(1, ' '.join(os.environ[n] for n in {names}).encode() + b'\\n')"
    process = launch(f"{script}\n{DONE}", 3)
    words = [line.split() for line in process.communicate()[0].splitlines()]
    assert process.returncode == 0
    assert sorted(word[:3] for word in words) == [[str(r), "3", str(r)] for r in range(3)]
    assert len({word[3] for word in words}) == 1


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_run_local_ranks_one_failure_ends_the_others(ending, code):
    script = f"""
import os, signal, sys
if os.environ["RANK"] == "1":
    {ending}
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"told to stop\\n"), sys.exit(143)))
signal.pause()
"""
    process = launch(script)
    assert process.communicate()[0] in ("told to stop\n", "")  # "": told before it listened
    assert process.returncode == code


def test_run_local_ranks_rank_that_a_library_ends_with_exit_code_0_has_failed():
    script = f"""
import ctypes, os, signal
if os.environ["RANK"] == "1":
    ctypes.CDLL(None)._exit(0)
{DONE}
"""
    process = launch(script, stderr=subprocess.PIPE)
    assert process.communicate() == (
        "", "error: a rank ended with exit code 0 before its work was done\n"
    )  # fmt: skip
    assert process.returncode == 1


def test_run_local_ranks_sigterm_reaches_every_rank_and_is_the_exit_code():
    script = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"stopped\\n"), sys.exit(143)))
os.write(1, b"ready\\n")
signal.pause()
"""
    process = launch(script)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.terminate()
    assert process.communicate()[0] == "stopped\n" * 2
    assert process.returncode == 143


# Twice at most, as a training run that writes a checkpoint first.
TOLD = """
import os, signal, sys
def told(number, _frame):
    signal.signal(number, lambda *_: (os.write(1, b"again\\n"), os._exit(130)))
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, told)
os.write(1, b"ready\\n")
while True: signal.pause()
"""


def test_run_local_ranks_ctrl_c_reaches_every_rank_as_itself_and_the_second_too():
    process = launch(TOLD)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["SIGINT\n"] * 2
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["again\n"] * 2
    process.communicate()
    assert process.returncode == 130


def test_run_local_ranks_ctrl_c_ignored_from_the_start_stays_ignored():
    process = launch(TOLD, sigint=signal.SIG_IGN)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGINT)
    process.terminate()
    assert [process.stdout.readline() for _ in range(2)] == ["SIGTERM\n"] * 2
    process.terminate()
    process.communicate()
    assert process.returncode == 130


def test_run_local_ranks_ranks_die_with_a_killed_launcher():
    script = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    process = launch(script)
    assert [process.stdout.readline() != "" for _ in range(2)] == [True, True]
    process.kill()
    # The pipe reaches its end once the last rank is gone.
    assert process.communicate()[0] == ""


PROGRAM = """
import os, signal, sys
from post_training.core.errors import Interrupted, report
from post_training.stages.processes import raise_on_signals

raise_on_signals()
try:
    print("ready", flush=True)
    while True:
        signal.pause()
except Interrupted as error:
    print("closing", flush=True)
    for line in sys.stdin:
        print(line, end="", flush=True)
    sys.exit(report(error))
"""


@pytest.fixture
def start():
    """A process that takes its time to close what it has open; sigint: set for it at its start."""
    processes = []

    def start(sigint: int = signal.SIG_DFL) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_signal_interrupts_and_further_ones_of_slurm_change_nothing(start, number, code):
    process = start()
    process.send_signal(number)
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate("still here\n")[0] == "still here\n"
    assert process.returncode == code


def test_ctrl_c_while_a_run_is_closed_ends_it_at_once(start):
    process = start()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT


def test_ctrl_c_that_is_ignored_from_the_start_stays_ignored(start):
    process = start(signal.SIG_IGN)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "closing\n"
    process.communicate()
    assert process.returncode == 143
