"""Real processes; run_local_ranks sets signal handlers, so it runs in a process of its own."""

import signal
import subprocess
import sys
from subprocess import Popen

import pytest

from post_training.stages.processes import DONE_VARIABLE

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
