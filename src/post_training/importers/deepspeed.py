"""A configuration of DeepSpeed, a file or a mapping: the strategy, and what else it sets."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.importers.documents import read_document
from post_training.importers.translation import Translation
from post_training.stages.config import StageConfig
from post_training.train.config import TrainingStageConfig
from post_training.train.training_config import conflicts_with_settings

# What our settings say themselves: training, the optimizer and the schedule. The two are compared.
DECIDED = {
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
}
_STAGE = ("stage", "offload_optimizer", "offload_param")
# Of no use where the thing they tune is not in use.
_ONLY_WITH_NVME = {"aio"}
_OF_ITS_LOG = {"steps_per_print"}
_OFF_BY_DEFAULT = {"wall_clock_breakdown": False}


def use_deepspeed(translation: Translation, key: str, value: Any) -> None:
    """strategy and offload; the rest goes to distributed.deepspeed_config as it is."""
    if not value:
        translation.tell(key, "not set")
        return
    if isinstance(value, dict):
        given, name = value, key
    else:
        name = os.path.expandvars(str(value))
        path = Path(name)
        if not path.is_file():
            translation.refuse(key, f"no such file: {name} (paths are taken from here)")
            return
        try:
            given, _ = read_document(path)
        except UsageError as error:
            translation.refuse(key, str(error))
            return
    zero = dict(given.get("zero_optimization") or {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        translation.refuse(key, f"zero_optimization.stage must be 0, 1, 2 or 3 (got {stage})")
        return
    if (given.get("fp16") or {}).get("enabled") is True:
        translation.refuse(key, f"{name}: fp16 has no counterpart: use bf16")
    strategy = f"zero{stage}" if stage else "ddp"
    translation.put(key, "distributed.strategy", strategy, f"{name}: stage {stage}")
    if not stage:
        # Nothing is divided: of DeepSpeed's own settings only those of training mean something.
        for part in _others(translation, key, name, given, {}):
            translation.tell(key, f"{name}: {part}: of DeepSpeed, which ddp does without")
        return
    devices = {
        part: (zero.get(part) or {}).get("device", "none")
        for part in ("offload_optimizer", "offload_param")
    }
    if "nvme" in devices.values():
        translation.refuse(key, f"{name}: no counterpart of nvme: offload goes to the CPU's memory")
        return
    if devices["offload_param"] == "cpu":
        translation.put(key, "distributed.offload", "parameters")
    elif devices["offload_optimizer"] == "cpu":
        translation.put(key, "distributed.offload", "optimizer")
    rest = _others(translation, key, name, given, zero)
    if rest:
        translation.put(key, "distributed.deepspeed_config", rest, "merged with ours")


def _others(
    translation: Translation, key: str, name: str, given: dict[str, Any], zero: dict[str, Any]
) -> dict[str, Any]:
    rest: dict[str, Any] = {}
    for part, value in given.items():
        if part in ("zero_optimization", "fp16"):
            continue
        if part in DECIDED:
            translation.of_deepspeed.setdefault(name, {})[part] = value
            translation.tell(key, f"{name}: {part}: compared with our own settings of it")
        elif part in _OF_ITS_LOG:
            translation.tell(key, f"{name}: {part}: logging.logging_steps says it")
        elif part in _ONLY_WITH_NVME:
            translation.tell(key, f"{name}: {part}: only for offload to nvme")
        elif _is_off(value) or _OFF_BY_DEFAULT.get(part) == value:
            translation.tell(key, f"{name}: {part}: off, same here")
        else:
            rest[part] = value
    tuned = {k: v for k, v in zero.items() if k not in _STAGE and v != "auto"}
    if tuned:
        rest["zero_optimization"] = tuned
    for k, v in zero.items():
        if v == "auto":
            translation.tell(key, f"{name}: zero_optimization.{k}: ours")
    return rest


def conflicts_with_deepspeed(translation: Translation, config: StageConfig) -> Iterator[str]:
    """Where a file of DeepSpeed's says something else of training than the result, a line each.

    Their trainer refuses most of these too, when it starts."""
    if not isinstance(config, TrainingStageConfig):
        return
    for name, given in translation.of_deepspeed.items():
        parts = dict(given)
        accumulated = parts.pop("gradient_accumulation_steps", "auto")
        distributed = config.distributed.model_copy(update={"deepspeed_config": parts})
        for conflict in conflicts_with_settings(config.training, distributed):
            yield f"{name}: {conflict}"
        if accumulated == "auto" or translation.num_processes is None:
            continue
        micro, rows = (
            config.training.per_device_train_batch_size,
            config.training.effective_batch_size,
        )
        if micro * accumulated * translation.num_processes != rows:
            yield (
                f"{name}: gradient_accumulation_steps is {accumulated}: with {micro} rows × "
                f"{translation.num_processes} processes that is not "
                f"training.effective_batch_size, {rows}"
            )


def _is_off(value: Any) -> bool:
    """A part of which every switch is off."""
    return value == "auto" or (
        isinstance(value, dict) and all(each in (False, "auto") for each in value.values())
    )
