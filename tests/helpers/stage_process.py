"""Stages run in processes of their own: on several ranks, or to be killed at a chosen point.

The processes are forked from a server that has imported the training stack once.
"""

import functools
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from helpers.gloo_ranks import HANGS_S
from post_training.stages.context import Ranks, StageContext

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["post_training.train.sft", "post_training.train.dpo"])

# Where a run can be hit: (module, class, method, at which call, before or after it).
KILL_POINTS = {
    "while preparing data": ("data.prepared.prepare", "SequenceWriter", "append", 1, "after"),
    "before a forward pass": ("models.head", "ChunkedHead", "scoring", 14, "before"),
    "between two micro-batches": ("train.trainer", "Trainer", "training_step", 15, "after"),
    "in an evaluation": ("train.loss", "Evaluation", "sums", 2, "after"),
    "after an evaluation": ("train.metrics", "Metrics", "add_evaluation", 2, "after"),
    "before the optimizer state is saved": (
        "train.trainer",
        "Trainer",
        "_save_optimizer_and_scheduler",
        2,
        "before",
    ),
    "before the random state is saved": (
        "train.trainer",
        "Trainer",
        "_save_rng_state",
        2,
        "before",
    ),
    "before the digests of a checkpoint are saved": (
        "train.trainer",
        "Trainer",
        "_complete",
        2,
        "after",
    ),
    "before a checkpoint is published": ("train.checkpoint", "Checkpoints", "publish", 2, "before"),
    "before an old checkpoint is dropped": (
        "train.checkpoint",
        "Checkpoints",
        "_rotate",
        3,
        "before",
    ),
    "in a model for inference": ("models.save", "PreTrainedModel", "save_pretrained", 3, "after"),
    "before the model is saved": ("train.trainer", "Trainer", "train", 1, "after"),
}

# In `entrypoint dpo` alone.
DPO_KILL_POINTS = {
    "while preparing pairs": ("data.prepared.prepare", "SequenceWriter", "append", 1, "after"),
    "while computing the reference": ("models.score", "LogprobScorer", "score", 9, "after"),
}


def run_sft_on_ranks(config: dict[str, Any], run_dir: Path, **others: Any) -> list[int]:
    return run_stage_on_ranks("sft", config, run_dir, **others)


def run_stage_on_ranks(
    stage: str,
    config: dict[str, Any],
    run_dir: Path,
    *,
    world_size: int = 1,
    resuming: bool = False,
    kill_at: str | None = None,
    kill_ranks: tuple[int, ...] = (0, 1),
    kill_with: signal.Signals = signal.SIGKILL,
    max_file_bytes: int | None = None,
) -> list[int]:
    """Run the stage on `world_size` ranks; their exit codes (-9: killed).

    A rank's error is in `run_dir/../<name>.rank<r>.error`, the sha256 of the weights it trained in
    `….weights`. max_file_bytes: what the system lets a file have, as if the disk were full then.
    Errors: TimeoutError for ranks that wait for each other without end.
    """
    run_dir.mkdir(exist_ok=True)
    meeting_place = run_dir.parent / f"{run_dir.name}.meeting"
    meeting_place.unlink(missing_ok=True)
    processes = [
        _CONTEXT.Process(
            target=_run_rank,
            args=(
                stage,
                config,
                run_dir,
                Ranks(rank, rank, world_size, world_size),
                meeting_place,
                resuming,
                kill_at if rank in kill_ranks else None,
                kill_with,
                max_file_bytes,
            ),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    ended = time.monotonic() + HANGS_S
    for process in processes:
        process.join(timeout=max(0.0, ended - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    if hanging:  # their code would be that of a rank that was killed on purpose
        raise TimeoutError(f"{len(hanging)} of {world_size} ranks hung: {run_dir}")
    return [process.exitcode for process in processes]


def rank_file(run_dir: Path, rank: int, kind: str) -> Path:
    return run_dir.parent / f"{run_dir.name}.rank{rank}.{kind}"


def _run_rank(
    stage: str,
    config: dict[str, Any],
    run_dir: Path,
    ranks: Ranks,
    meeting_place: Path,
    resuming: bool,
    kill_at: str | None,
    kill_with: signal.Signals,
    max_file_bytes: int | None,
) -> None:
    import torch.distributed as dist

    from post_training.stages.registry import find_stage

    rank, world_size = ranks.rank, ranks.world_size
    # Ignored where a shell started the tests with `&`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        if world_size > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank}
            sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            os.environ |= {name: str(value) for name, value in {**places, **sizes}.items()}
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=world_size
            )
        _record_weights(rank_file(run_dir, rank, "weights"))
        if kill_at is not None:
            _kill_at(*(KILL_POINTS | DPO_KILL_POINTS)[kill_at], kill_with)
        context = StageContext(run_dir, ranks, resuming)
        found = find_stage(stage)
        found.load_run()(found.load_config_class().model_validate(config), context)
        if world_size > 1:
            dist.destroy_process_group()
    except BaseException:
        rank_file(run_dir, rank, "error").write_text(traceback.format_exc())
        os._exit(1)


def _kill_at(
    module: str, class_name: str, method: str, nth: int, when: str, kill_with: signal.Signals
) -> None:
    """Have the process sent a signal before or after the nth call of a method."""
    owner = getattr(__import__(f"post_training.{module}", fromlist=["_"]), class_name)
    original = getattr(owner, method)
    calls = 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), kill_with)
        result = original(*args, **kwargs)
        if calls == nth and when == "after":
            os.kill(os.getpid(), kill_with)
        return result

    setattr(owner, method, counted)


def _record_weights(path: Path) -> None:
    from post_training.train.trainer import Trainer

    original = Trainer.train

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        digest = hashlib.sha256()
        for _, weights in sorted(self.model.state_dict().items()):
            digest.update(weights.float().contiguous().numpy().tobytes())
        path.write_text(digest.hexdigest())
        return result

    Trainer.train = train


def start_entrypoint(
    arguments: list[str], log: Path, kill: tuple | None = None, folder: Path | None = None
) -> Any:
    """A process that does what `entrypoint ARGUMENTS` does; what it says goes to `log`.

    kill: the arguments of _kill_at. folder: where it is called.
    """
    process = _CONTEXT.Process(target=_entrypoint, args=(arguments, log, kill, folder))
    process.start()
    return process


def _entrypoint(arguments: list[str], log: Path, kill: tuple | None, folder: Path | None) -> None:
    from post_training.stages.__main__ import main

    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
    if kill is not None:
        _kill_at(*kill)
    if folder is not None:
        os.chdir(folder)
    code = main(arguments)
    sys.stderr.flush()
    os._exit(code)
