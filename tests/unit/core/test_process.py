import os
import subprocess
import sys

import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.process import dies_with, run_tool


def test_run_tool_returns_stripped_stdout_and_passes_odd_words():
    assert run_tool(["printf", "%s|", "a b", "$HOME", "*"]) == "a b|$HOME|*|"


def test_run_tool_failure_shows_the_end_of_the_output():
    with pytest.raises(PostTrainingError) as raised:
        run_tool(["sh", "-c", "seq 100; echo reason >&2; exit 3"])
    lines = str(raised.value).splitlines()
    assert lines[0] == "sh failed with exit code 3"
    assert lines[-1] == "  reason"
    assert len(lines) == 13


def test_run_tool_missing_program_is_named():
    with pytest.raises(PostTrainingError, match="no-such-program: not installed"):
        run_tool(["no-such-program"])


def test_dies_with_kills_the_child_when_its_parent_is_killed():
    script = (
        "import os, subprocess, signal\n"
        "from post_training.core.process import dies_with\n"
        "subprocess.Popen(['sleep', '1000'], preexec_fn=dies_with(os.getpid()))\n"
        "print('started', flush=True); signal.pause()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "started\n"
    parent.kill()
    # The child holds the pipe's other end: it is read to its end once the child is gone.
    assert parent.communicate()[0] == ""


def test_run_tool_that_ends_with_us_is_ended_when_this_process_is_killed():
    script = (
        "import signal\n"
        "from post_training.core.process import run_tool\n"
        "command = ['sh', '-c', 'echo started; exec sleep 1000']\n"
        "run_tool(command, show=True, ends_with_us=signal.SIGKILL)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert parent.stderr.readline() == "started\n"
    parent.kill()
    assert parent.communicate()[1] == ""  # Until the child is gone, it holds the pipe.


def test_dies_with_a_parent_that_is_gone_starts_nothing():
    done = subprocess.run(["echo", "ran"], preexec_fn=dies_with(1), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, b"")
    assert os.getpid() != 1
