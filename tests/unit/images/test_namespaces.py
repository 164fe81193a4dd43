import os
import pty
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.images.namespaces import can_emulate, is_emulated

OTHER = {"x86_64": 183, "aarch64": 62}[os.uname().machine]


def elf(machine: int) -> bytes:
    """The first fields of a little-endian 64-bit program (elf(5))."""
    identification = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return identification + struct.pack("<HHI", 3, machine, 1) + bytes(40)


def test_emulated_is_a_program_of_another_processor(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(elf(OTHER))
    assert is_emulated(program)
    assert not is_emulated(Path(sys.executable))


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\nexit 0\n# a script of some length\n", elf(OTHER)[:19]]
)
def test_emulated_is_nothing_that_is_no_program(tmp_path, content):
    program = tmp_path / "program"
    program.write_bytes(content)
    assert not is_emulated(program)


def test_emulation_is_seen_by_what_the_kernel_has_registered(tmp_path):
    entry = tmp_path / "qemu-aarch64"
    magic = "7f454c460201010000000000000000000200b700"
    lines = f"interpreter /usr/libexec/qemu\nflags: POF\noffset 0\nmagic {magic}\n"
    assert not can_emulate("aarch64", tmp_path)
    (tmp_path / "register").write_text("")
    (tmp_path / "status").write_text("enabled\n")
    entry.write_text(f"enabled\n{lines}")
    assert can_emulate("aarch64", tmp_path)
    assert not can_emulate("x86_64", tmp_path)
    entry.write_text(f"disabled\n{lines}")
    assert not can_emulate("aarch64", tmp_path)


# As process 1 of a pid namespace, as `docker run` starts a command.
FIRST = [
    *("unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])),
    *("--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c"),
    "import os, sys; from post_training.images.namespaces import leave_pid_1;"
    "assert os.getpid() == 1; leave_pid_1(); os.execvp(sys.argv[1], sys.argv[1:])",
]
CAUGHT = "trap 'echo got; exit 3' TERM INT; echo ready; while :; do sleep 0.01; done"


@pytest.mark.parametrize(
    ("command", "exit_code", "said"),
    [
        (["sh", "-c", "echo ready; exec sleep 1000"], 128 + signal.SIGTERM, ""),
        (["sh", "-c", CAUGHT], 3, "got\n"),
    ],
)
def test_command_of_process_1_gets_sigterm(command, exit_code, said):
    with subprocess.Popen([*FIRST, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert process.stdout.read() == said
    assert process.returncode == exit_code


def test_command_of_process_1_keeps_its_exit_code_and_leaves_no_orphan():
    script = "(sleep 0.01 &); while pgrep sleep; do :; done; exit 7"
    assert subprocess.run([*FIRST, "sh", "-c", script], stdout=subprocess.PIPE).returncode == 7


def test_command_of_process_1_gets_ctrl_c_of_a_terminal_once():
    count = "n=0; trap 'n=$((n+1))' INT; echo ready; while [ $n = 0 ]; do sleep 0.01; done; "
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", *FIRST, "sh", "-c", f"{count} sleep 0.1; exit $n"]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=subprocess.PIPE,
        text=True,
        # Ignored where a shell started the tests with `&`, and no shell traps what is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.write(ours, b"\x03")
        assert process.wait() == 1
    os.close(ours)
    os.close(theirs)
