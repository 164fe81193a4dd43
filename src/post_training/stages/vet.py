"""`submit --vet`: is this node fit for the job? Every task asks, in the image, before the stage.

    this task's device      computes what is known, and nobody else is on it
    the run's folder        can be written and read
    the node's devices      add up what is known, by NCCL or RCCL (gloo without GPUs)
    all devices of the job  the same; here no node can be named

It prints `Vetted: NODE`, or `Cordon: NODE` and why on stderr: the words of CSCS's vetnode
(https://github.com/eth-cscs/vetnode), which job scripts look for. Exit code 1 for any fault.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from post_training.core.errors import report, tell
from post_training.images.doctor import Finding, check_writable, wrong
from post_training.stages.doctor import check_device
from post_training.stages.processes import Launch, detect_launch

_TIMEOUT_S = 50
_NUM_ELEMENTS = 1 << 24
_NODE_PORT = 19999


def main(run_dir: Path) -> int:
    """Print the verdict of this task's node; the exit code."""
    # A collective that hangs must become an error that can be told, not an abort.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    launch = detect_launch(os.environ)
    device = _device(launch)
    faults = [*_faults_here(run_dir, device)]
    # One after another: with a broken device a collective would only wait.
    if not faults and launch is not None and launch.local_world_size > 1:
        rendezvous = f"127.0.0.1:{_NODE_PORT}"
        faults += _collective(
            rendezvous, launch.local_rank, launch.local_world_size, device, "of this node"
        )
    if faults:
        for fault in faults:
            tell(f"{node}: {fault}")
        print(f"Cordon: {node}", flush=True)
        return 1
    print(f"Vetted: {node}", flush=True)
    if launch is None or launch.world_size == launch.local_world_size:
        return 0
    faults = _collective(launch.rendezvous, launch.rank, launch.world_size, device, "of the job")
    for fault in faults:
        tell(f"{node}: {fault}: the network, or a node that was named above")
    return 1 if faults else 0


def _device(launch: Launch | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each task its own device alone.
    return torch.device("cuda", (launch.local_rank if launch else 0) % torch.cuda.device_count())


def _faults_here(run_dir: Path, device: torch.device) -> Iterator[str]:
    findings: list[Finding] = [*check_writable("run folder", run_dir)]
    if device.type == "cuda":
        findings += check_device(torch, device.index)
    elif os.environ.get("SLURM_GPUS_ON_NODE"):
        findings.append(wrong("devices", "the job has GPUs, and torch sees none"))
    # A note is of somebody else on the device: a job of ours has its nodes alone.
    yield from (f"{each.subject}: {each.text}" for each in findings if each.status != "ok")


def _collective(
    rendezvous: str, rank: int, world_size: int, device: torch.device, whose: str
) -> list[str]:
    """Faults of a sum over `world_size` ranks. rendezvous: host:port of the first of them."""
    return _told(
        lambda: _sum_ranks(rendezvous, rank, world_size, device), f"the devices {whose} cannot add"
    )


def _told(work: Callable[[], str | None], problem: str) -> list[str]:
    try:
        fault = work()
    except (RuntimeError, OSError, dist.DistError) as error:
        fault = str(error).splitlines()[0]
    return [f"{problem}: {fault}"] if fault else []


def _sum_ranks(rendezvous: str, rank: int, world_size: int, device: torch.device) -> str | None:
    """Add up the ranks' numbers, 64 MiB at once: what is wrong with the sum, or None."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    try:
        numbers = torch.full((_NUM_ELEMENTS,), float(rank + 1), device=device)
        dist.all_reduce(numbers)
        # Whole numbers below 2**24: exact in float32, in any order.
        expected = world_size * (world_size + 1) / 2
        if not bool((numbers == expected).all()):
            return f"the sum is not {expected:.0f}"
    finally:
        dist.destroy_process_group()
    return None


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))
