"""What tests run on several ranks (helpers.gloo_ranks): a function of an importable module.

A step that is not finite; and a tiny model that FSDP2 divides among ranks on CPUs, saved and read
in its own format. The stages refuse FSDP2 without GPUs, as accelerate does; torch's part of it
works with gloo, and is what accelerate's save_fsdp_model, save_fsdp_optimizer and their
counterparts call.
"""

from math import inf, nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from post_training.core.errors import PostTrainingError
from post_training.stages.context import StageContext
from post_training.train.checksums import Checksums, first_difference, state_checksums
from post_training.train.metrics import MicroBatchLoss, stop_unless_finite


def loss_on_second_rank(context: StageContext) -> str:
    losses = (1.0, nan) if context.ranks.rank == 1 else (1.0, 2.0)
    return _words(context, losses, loss=nan, grad_norm=nan)


def gradient_only(context: StageContext) -> str:
    return _words(context, (1.0, 2.0), loss=1.5, grad_norm=inf)


def _words(
    context: StageContext, losses: tuple[float, ...], *, loss: float, grad_norm: float
) -> str:
    first_row = 100 * context.ranks.rank
    batches = [MicroBatchLoss(value, (first_row + n,)) for n, value in enumerate(losses)]
    try:
        stop_unless_finite(7, loss, grad_norm, batches, context)
    except PostTrainingError as error:
        return str(error)
    return "went on"


def resume_divided_model(context: StageContext) -> list[str | None]:
    """What is said of this rank's part: as it was saved and read; with one number of it changed;
    and of another model."""
    trained = _divided(seed=0)
    _step(*trained)
    written = _checksums(*trained)
    _save(context.run_dir / "checkpoint", *trained[:2])
    read = _divided(seed=1)
    _load(context.run_dir / "checkpoint", *read)
    same = first_difference(written, _checksums(*read))
    weights = read[0][0].weight.to_local()
    if context.ranks.rank == 1:
        weights.detach()[0, 0] += 1e-3
    return [same, first_difference(written, _checksums(*read))]


def _divided(seed: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, optimizer, schedule


def _step(model: Any, optimizer: Any, schedule: Any) -> None:
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    schedule.step()


def _checksums(model: Any, optimizer: Any, schedule: Any) -> Checksums:
    return state_checksums(model, optimizer, schedule, is_deepspeed=False)


def _save(folder: Path, model: Any, optimizer: Any) -> None:
    weights, averages = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": averages}, checkpoint_id=folder)


def _load(folder: Path, model: Any, optimizer: Any, schedule: Any) -> None:
    weights, averages = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": averages}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 1, "_step_count": 2})
    schedule._last_lr = [0.05]
