"""A configuration of DeepSpeed, a file or a mapping: the strategy, and what else it sets."""

import os
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.importers.documents import read_document
from post_training.importers.translation import Translation

# What our settings say themselves: training, the optimizer and the schedule.
_DECIDED = {
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "steps_per_print",
}
_STAGE = ("stage", "offload_optimizer", "offload_param")
# Of no use where the thing they tune is not in use.
_ONLY_WITH_NVME = {"aio"}
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
    if stage not in (1, 2, 3):
        translation.refuse(key, f"zero_optimization.stage must be 1, 2 or 3 (got {stage})")
        return
    translation.put(key, "distributed.strategy", f"zero{stage}", f"{name}: stage {stage}")
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
    if (given.get("fp16") or {}).get("enabled") is True:
        translation.refuse(key, f"{name}: fp16 has no counterpart: use bf16")
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
        if part in _DECIDED:
            translation.tell(key, f"{name}: {part}: set by our own settings")
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


def _is_off(value: Any) -> bool:
    """A part of which every switch is off."""
    return value == "auto" or (
        isinstance(value, dict) and all(each in (False, "auto") for each in value.values())
    )
