"""A function on several ranks that are joined by gloo, each a process of its own."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_training.stages.context import Ranks, StageContext

_CONTEXT = multiprocessing.get_context("forkserver")


def on_ranks(
    function: Callable[[StageContext], Any], world_size: int, folder: Path, timeout_s: float = 60
) -> list[Any]:
    """What `function`, of an importable module, returns on each rank, in their order."""
    queue = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_run_rank, args=(function, rank, world_size, folder, queue))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=timeout_s) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=timeout_s)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    function: Callable[[StageContext], Any], rank: int, world_size: int, folder: Path, queue: Any
) -> None:
    import torch.distributed as dist

    meeting_place = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=world_size)
    queue.put((rank, function(StageContext(folder, Ranks(rank, rank, world_size, world_size)))))
    dist.barrier()
    dist.destroy_process_group()
