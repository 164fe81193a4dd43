"""`entrypoint doctor`: the image, this node and what was mounted: what is right, what is wrong."""

import json
import os
from collections.abc import Iterator
from typing import Any

from post_training.images.doctor import (
    Finding,
    describe_findings,
    examine,
    examine_image,
    note,
    ok,
    wrong,
)
from post_training.images.identity import IMAGE_FILE


def main() -> int:
    """Print the findings; the exit code, 1 when something is wrong."""
    findings = [*examine_image(os.environ), *examine("devices", lambda: devices(_image_name()))]
    code, text = describe_findings(findings)
    print(text)
    return code


def devices(image_name: str | None) -> Iterator[Finding]:
    """What torch sees, and computes. image_name: a GPU's image without one is wrong."""
    import torch

    build = f"torch {torch.__version__}"
    if torch.version.cuda:
        build += f" (CUDA {torch.version.cuda})"
    if torch.version.hip:
        build += f" (ROCm {torch.version.hip})"
    count = torch.cuda.device_count()
    if count == 0:
        cores = len(os.sched_getaffinity(0))
        if image_name in (None, "cpu"):
            yield ok("devices", f"{build}, CPU, {cores} cores")
            return
        yield wrong(
            "devices",
            f"{build} sees no GPU",
            "on Alps NVIDIA_VISIBLE_DEVICES must be set; elsewhere `--nv` may be missing; not on a "
            "login node",
        )
        return
    for index in range(count):
        yield from check_device(torch, index)
    yield ok("devices", f"{build}, {_collectives(torch)}")


def check_device(torch: Any, index: int) -> Iterator[Finding]:
    """Whether one device computes what is known, and has its memory to itself."""
    properties = torch.cuda.get_device_properties(index)
    name = f"{index}: {properties.name}, {properties.total_memory / (1 << 30):.0f} GiB"
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        is_right = (ones @ ones).sum().item() == 64.0**3
    except RuntimeError as error:
        yield wrong("devices", f"{name}: cannot compute: {str(error).splitlines()[0]}")
        return
    free, total = torch.cuda.mem_get_info(index)
    if not is_right:
        yield wrong("devices", f"{name}: a product of ones is wrong", "exclude this node")
    elif free < 0.9 * total:
        yield note("devices", f"{name}: {free / (1 << 30):.0f} GiB free: somebody else is on it")
    else:
        yield ok("devices", name)


def _collectives(torch: Any) -> str:
    version = ".".join(str(number) for number in torch.cuda.nccl.version())
    return f"{'RCCL' if torch.version.hip else 'NCCL'} {version}"


def _image_name() -> str | None:
    try:
        return json.loads(IMAGE_FILE.read_text())["name"]
    except FileNotFoundError:
        return None
