import json
import struct
from math import prod

import pytest

FORMATS = {"F32": "f", "I64": "q", "BF16": "H", "BOOL": "?"}


@pytest.fixture
def write_tensors():
    return write


def write(path, **tensors):
    """A safetensors file; each tensor is (dtype, shape, values)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, values) in tensors.items():
        packed = struct.pack(f"<{prod(shape)}{FORMATS[dtype]}", *values)
        offsets = [len(data), len(data) + len(packed)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += packed
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
