"""What a checkpoint is compared with, so that no run goes on from other weights than it had.

    checksums/files.json     whose checkpoint it is, how training was divided, and the sha256 of
                             every other file
    checksums/rank-N.json    what rank N had in memory: weights, optimizer, schedule, random state

A file that was changed on disk is found before the model is read. What was read is compared with
what was in memory at the save, before the first step: a weight that some library left out, renamed,
cast or put elsewhere ends the run. So does a whole checkpoint of another run: of another recipe,
other inputs, or another image.

Where weights or the optimizer's state are divided, each rank has a part of its own. With ddp all
ranks have what rank 0 has; only their random states are their own. Frozen weights are left out:
they come from an input, whose bytes the record knows.

Of a checkpoint of 1.6 GB (134M parameters in float32, AdamW) what is in memory takes 0.3 s of one
core with xxh3_128, its files 1.4 s with sha256, which all ranks and their threads share; writing it
takes 2.1 s, and the disk's time.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json, write_json
from post_training.core.hashing import hash_named
from post_training.records.run_record import identity_of
from post_training.stages.context import StageContext

FOLDER = "checksums"
FILES = f"{FOLDER}/files.json"
_SCHEMA = "post-training/checkpoint/1"
_PIECE_BYTES = 64 * 2**20  # copied from a GPU at once
_LARGE_BYTES = 2**20  # smaller files are all rank 0's
_OTHER_CHECKPOINT = "bring it back as it was written; or remove it, to go on from an older one"

_NOT_THE_SAME = (
    "its libraries are not those that wrote it: go on with the same image; or remove it, to go on "
    "from an older one"
)

# {"weights", "optimizer", "schedule", "random": {name: dtype, shape and xxh3_128 of the bytes}}
Checksums = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Division:
    """How training is divided among the processes."""

    strategy: str
    world_size: int

    @property
    def is_sharded(self) -> bool:
        return self.strategy != "ddp"


def write_files(folder: Path, division: Division, context: StageContext) -> None:
    """Write FILES, the last file of a checkpoint. All ranks call it."""
    files = _hash_files(folder, context)
    record = {"schema": _SCHEMA, "run": _run(context), **asdict(division), "files": files}
    context.on_writer(lambda: write_json(folder / FILES, record))


def check_files(folder: Path, division: Division, context: StageContext) -> None:
    """All ranks call it, before the model is read.

    Errors: UsageError where a file is not what was written, or the checkpoint can't be gone on from
    by a training that is divided so.
    """
    record = context.on_writer(lambda: _read_files(folder))
    context.on_writer(lambda: _check_run(folder, record, context))
    written = Division(record["strategy"], record["world_size"])
    found = _hash_files(folder, context)
    context.on_writer(lambda: _compare_files(folder, record["files"], found))
    context.on_writer(lambda: _check_division(folder, written, division))


def _read_files(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / FILES, _SCHEMA)
    except FileNotFoundError:
        raise UsageError(
            f"the checkpoint has no {FILES}, so nobody can say whether it is whole: an earlier "
            "version wrote it, or the file was taken away",
            where=str(folder),
            hint=_OTHER_CHECKPOINT,
        ) from None


def _run(context: StageContext) -> str | None:
    """Of the run's identity, what no flag lets change; None where there is no record."""
    what = context.description
    return what and identity_of({**asdict(what), "topology": {}})


def _check_run(folder: Path, record: Mapping[str, Any], context: StageContext) -> None:
    if record.get("run") != _run(context):
        raise UsageError(
            "the checkpoint is of another run (another recipe, input or image), or an earlier "
            "version wrote it",
            where=str(folder),
            hint=_OTHER_CHECKPOINT,
        )


def _compare_files(folder: Path, written: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in sorted(written.keys() | found.keys()):
        if name not in found:
            problem = "is gone from the checkpoint"
        elif name not in written:
            problem = "was added to the checkpoint"
        elif written[name] != found[name]:
            problem = (
                f"was changed since the checkpoint was written: its sha256 is {found[name][:12]}…, "
                f"and was {written[name][:12]}…"
            )
        else:
            continue
        raise UsageError(problem, where=str(folder / name), hint=_OTHER_CHECKPOINT)


def _check_division(folder: Path, written: Division, now: Division) -> None:
    # A topology change may be allowed; transformers would then begin with a new optimizer, unsaid.
    if written.strategy != now.strategy:
        raise UsageError(
            f"a checkpoint of distributed.strategy {written.strategy} can't be continued with "
            f"{now.strategy}",
            where=str(folder),
        )
    # DeepSpeed divides for a fixed number of processes.
    if now.strategy.startswith("zero") and written.world_size != now.world_size:
        raise UsageError(
            f"a checkpoint of {written.strategy} on {written.world_size} processes can't be "
            f"continued on {now.world_size}",
            where=str(folder),
        )


def _hash_files(folder: Path, context: StageContext) -> dict[str, str]:
    """{path: sha256} of all files but FILES and hidden ones; each rank reads a share of the large
    ones."""

    def sizes() -> dict[str, int]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        named = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return {
            name: size
            for name, size in sorted(named.items())
            if name != FILES and not Path(name).name.startswith(".")
        }

    found = context.on_writer(sizes)
    ranks = context.ranks
    own = [name for name, size in found.items() if size >= _LARGE_BYTES][
        ranks.rank :: ranks.world_size
    ]
    if ranks.is_writer:
        own += [name for name, size in found.items() if size < _LARGE_BYTES]
    hashes = context.gather(hash_named(folder, own))
    return {name: digest for part in hashes for name, digest in part.items()}


def state_checksums(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    *,
    is_deepspeed: bool,
) -> Checksums:
    """Of this rank's part of what training goes on from, but for its random state."""
    state = optimizer.state_dict()
    if not is_deepspeed:
        state = _named(state, model, optimizer)
    return {
        "weights": {name: _checksum(tensor) for name, tensor in trained_tensors(model)},
        "optimizer": _checksums_below(state),
        "schedule": _checksums_below(schedule.state_dict()),
    }


def random_checksums() -> dict[str, str]:
    """Of the generators that the Trainer saves."""
    algorithm, keys, *rest = np.random.get_state()
    states = {
        "python": repr(random.getstate()).encode(),
        "numpy": repr((algorithm, keys.tolist(), rest)).encode(),
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return {name: f"state {xxhash.xxh3_128_hexdigest(one)}" for name, one in states.items()}


def write_rank(folder: Path, rank: int, own: Checksums) -> None:
    (folder / FOLDER).mkdir(exist_ok=True)
    write_json(_rank_file(folder, rank), own)


def read_rank(folder: Path, division: Division, rank: int) -> Checksums | None:
    """What this rank had in memory at the save; None where that was divided among other ranks. The
    random state of a rank that was not there is left out."""
    same_size = _read_files(folder)["world_size"] == division.world_size
    if division.is_sharded:
        return json.loads(_rank_file(folder, rank).read_text()) if same_size else None
    shared = json.loads(_rank_file(folder, 0).read_text())
    own = json.loads(_rank_file(folder, rank).read_text()) if same_size else {}
    return {**shared, "random": own.get("random", {})}


def first_difference(written: Checksums, found: Checksums) -> str | None:
    """In words, or None. Only the kinds that were `found` are compared."""
    for kind, now in found.items():
        if problem := _first_difference(written[kind], now):
            return f"{kind}: {problem}"
    return None


def first_other_name(written: Checksums, model: nn.Module) -> str | None:
    """In words, or None: what can be said before weights are loaded under these names."""
    names = dict.fromkeys((name for name, _ in trained_tensors(model)), "")
    return first_difference({"weights": dict.fromkeys(written["weights"], "")}, {"weights": names})


def _first_difference(written: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    if missing := [name for name in written if name not in found]:
        return f"{missing[0]} is in the checkpoint and not in this training{_more(missing)}"
    if unexpected := [name for name in found if name not in written]:
        return f"{unexpected[0]} is not in the checkpoint{_more(unexpected)}"
    different = [name for name in written if written[name] != found[name]]
    if not different:
        return None
    name = different[0]
    before, now = written[name].rsplit(" ", 1)[0], found[name].rsplit(" ", 1)[0]
    if before != now:
        return f"{name} is {now}, and was {before} when the checkpoint was written"
    return f"{name} is not what it was when the checkpoint was written{_more(different)}"


def refuse(problem: str | None, folder: Path, context: StageContext) -> None:
    """End every rank where one of them has a problem. All ranks call it."""
    problems = context.gather(problem)

    def fail() -> None:
        for rank, told in enumerate(problems):
            if told is not None:
                where = f" on rank {rank}" if len(problems) > 1 else ""
                raise PostTrainingError(f"{told}{where}", where=str(folder), hint=_NOT_THE_SAME)

    context.on_writer(fail)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.json"


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, this rank's part) of what is trained and of the buffers that are saved."""
    frozen = {id(weights) for weights in model.parameters() if not weights.requires_grad}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in frozen:
            # With ZeRO-3 the parameter itself is empty between the steps.
            yield name, getattr(tensor, "ds_tensor", tensor)


def _named(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """An optimizer's state dict, with the names of the weights instead of their numbers."""
    known = {id(weights): name for name, weights in model.named_parameters()}
    weights = [weights for group in optimizer.param_groups for weights in group["params"]]
    names = {number: known.get(id(one), str(number)) for number, one in enumerate(weights)}
    return {**state, "state": {names[number]: own for number, own in state["state"].items()}}


def _checksums_below(state: Any, path: str = "") -> dict[str, str]:
    """{path: checksum} of all tensors and numbers in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return {path: _checksum(state)}
    if isinstance(state, int | float) and not isinstance(state, bool):
        return {path: f"number {state!r}"}
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:  # a function, a text, an object of a library
        return {}
    found: dict[str, str] = {}
    for key, value in items:
        found |= _checksums_below(value, f"{path}.{key}" if path else str(key))
    return found


def _checksum(tensor: Tensor) -> str:
    """Dtype, shape and hash of what this rank has of it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    digest = xxhash.xxh3_128()
    flat = tensor.detach().contiguous().view(-1)
    for piece in flat.split(_PIECE_BYTES // max(1, flat.element_size())):
        digest.update(piece.cpu().view(torch.uint8).numpy())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {digest.hexdigest()}"
