"""Locks among real processes; a file system without any is played by the answer of fcntl(2)."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.core.locks import hold, is_held, locked


@contextmanager
def holder(path: Path, program: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs it and says `ready` when it holds the lock; killed at the end."""
    command = [sys.executable, "-c", f"import sys; from pathlib import Path\n{program}", str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


HOLD = """
from post_training.core.locks import hold
lock = hold(Path(sys.argv[1]))
"""
WAIT = """
print("ready", flush=True)
sys.stdin.read()
"""


def test_hold_keeps_another_process_out_until_it_is_killed(tmp_path):
    with holder(tmp_path / "lock", HOLD + WAIT):
        assert hold(tmp_path / "lock") is None
        assert is_held(tmp_path / "lock")
    assert not is_held(tmp_path / "lock")
    assert hold(tmp_path / "lock") is not None


def test_hold_lasts_when_its_process_looks_at_the_file(tmp_path):
    look = "open(sys.argv[1]).close(); open(sys.argv[1], 'a').close()"
    with holder(tmp_path / "lock", HOLD + look + WAIT):
        assert is_held(tmp_path / "lock")
        assert hold(tmp_path / "lock") is None
    lock = hold(tmp_path / "lock")
    assert is_held(tmp_path / "lock")
    assert is_held(tmp_path / "lock")
    lock.close()
    assert not is_held(tmp_path / "lock")


def test_hold_ends_with_its_process_whatever_it_forked(tmp_path):
    fork = """
import os
if os.fork() == 0:
    print("ready", flush=True)
    sys.stdin.read()
    sys.exit()
sys.stdout = None
os.wait()
"""
    with holder(tmp_path / "lock", HOLD + fork) as process:
        assert is_held(tmp_path / "lock")
        process.kill()
        process.wait()
        assert not is_held(tmp_path / "lock")
        process.stdin.close()  # The forked one ends.


def test_hold_and_a_plain_lock_of_fcntl_keep_each_other_out(tmp_path):
    plain = "import fcntl\nlock = open(sys.argv[1], 'w')\nfcntl.lockf(lock, fcntl.LOCK_EX)\n"
    with holder(tmp_path / "lock", plain + WAIT):
        assert is_held(tmp_path / "lock")
        assert hold(tmp_path / "lock") is None
    lock = hold(tmp_path / "lock")
    with open(tmp_path / "lock", "w") as other, pytest.raises(BlockingIOError):
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


def test_locked_waits_and_says_so_once(tmp_path):
    waits = []
    with holder(tmp_path / "lock", HOLD + WAIT) as process:

        def let_it_end() -> None:
            waits.append("waiting")
            process.stdin.close()

        with locked(tmp_path / "lock", let_it_end):
            assert process.wait() == 0
            assert hold(tmp_path / "lock") is None
    with locked(tmp_path / "lock", let_it_end):
        assert waits == ["waiting"]


def answer_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", fails)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_named(number, monkeypatch, tmp_path):
    path = tmp_path / "lock"
    path.touch()
    answer_with(number, monkeypatch)
    for ask in (hold, is_held, lambda path: locked(path).__enter__()):
        with pytest.raises(UsageError, match="can't be locked on this file system") as raised:
            ask(path)
        assert raised.value.where == str(path)
        kind, mounted = raised.value.problem.split("(")[1].split(")")[0].split(", mounted on ")
        table = Path("/proc/self/mountinfo").read_text()
        assert any(f" {mounted} " in line and f" - {kind} " in line for line in table.splitlines())
        assert tmp_path.is_relative_to(mounted)
        assert "Lustre: -o flock" in raised.value.hint


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_failure_of_the_file_system_is_told_as_what_it_is(number, monkeypatch, tmp_path):
    answer_with(number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        hold(tmp_path / "lock")
    assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "lock"))


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_either_answer_for_a_lock_that_somebody_holds_means_so(number, monkeypatch, tmp_path):
    answer_with(number, monkeypatch)
    assert hold(tmp_path / "lock") is None


def test_file_that_may_not_be_written_is_no_lock_that_somebody_holds(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError):
        hold(tmp_path / "lock")
