"""A function on several ranks that are joined by gloo, each a process of its own."""

import multiprocessing
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from post_training.stages.context import Ranks, StageContext

_CONTEXT = multiprocessing.get_context("forkserver")
# Far more than anything here takes, however much else the machine does: it only ends a deadlock.
HANGS_S = 3600


def on_ranks(function: Callable[[StageContext], Any], world_size: int, folder: Path) -> list[Any]:
    """What `function`, of an importable module, returns on each rank, in their order.

    Errors: AssertionError for a rank that ends without a result; its traceback is on stderr.
    """
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        _CONTEXT.Process(target=_run_rank, args=(function, rank, world_size, folder, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()  # Else its end would stay open here when the rank is gone.
    try:
        results = _results([receiver for receiver, _ in pipes])
        for process in processes:
            process.join(HANGS_S)
    finally:
        for process in processes:
            process.kill()
    return results


def _results(receivers: list[connection.Connection]) -> list[Any]:
    """Of each rank, in whatever order they come: the others may wait for one that is gone."""
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    results: dict[int, Any] = {}
    while waiting:
        ready = connection.wait(list(waiting), HANGS_S)
        assert ready, f"ranks {sorted(waiting.values())} hang"
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                results[rank] = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without a result") from None
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(
    function: Callable[[StageContext], Any],
    rank: int,
    world_size: int,
    folder: Path,
    sender: connection.Connection,
) -> None:
    import torch.distributed as dist

    meeting_place = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=world_size)
    sender.send(function(StageContext(folder, Ranks(rank, rank, world_size, world_size))))
    dist.barrier()
    dist.destroy_process_group()
