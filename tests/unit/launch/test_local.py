"""Real processes; run_local_ranks sets signal handlers, so it runs in a process of its own."""

import subprocess
import sys

import pytest

LAUNCHER = """
import sys
from post_training.launch.local import run_local_ranks
sys.exit(run_local_ranks([sys.executable, "-c", sys.argv[2]], int(sys.argv[1])))
"""


def launch(script: str, num_processes: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(num_processes), script],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_run_local_ranks_gives_every_rank_its_variables():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]
    # One write a process, so that lines don't mix.
    script = f"import os; os.write(1, ' '.join(os.environ[n] for n in {names}).encode() + b'\\n')"
    process = launch(script, 3)
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


def test_run_local_ranks_ranks_die_with_a_killed_launcher():
    script = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    process = launch(script)
    assert [process.stdout.readline() != "" for _ in range(2)] == [True, True]
    process.kill()
    # The pipe reaches its end once the last rank is gone.
    assert process.communicate()[0] == ""
