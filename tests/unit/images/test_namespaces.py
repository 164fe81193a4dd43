import os
import struct
import sys
from pathlib import Path

import pytest

from post_training.images.namespaces import is_emulated

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
