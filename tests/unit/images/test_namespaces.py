import os
import struct
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
