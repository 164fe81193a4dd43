"""PyTorch's FSDP as TrainingArguments, Axolotl and accelerate write it: `fsdp`, `fsdp_config`.

All of it becomes distributed.strategy: fsdp2. How weights are gathered changes memory and time, and
not what is computed.
"""

from typing import Any

from post_training.importers.translation import Ours, Table, Translation

_WORDS = ("full_shard", "auto_wrap", "true")
_SHARED = ("full_shard", "1")
_UNITS = "each layer of the model is a unit"
_GATHERED = "when weights are gathered and freed changes no result"
_OURS = {
    "version": "fsdp2 computes what version 1 does",
    "auto_wrap_policy": _UNITS,
    "transformer_layer_cls_to_wrap": _UNITS,
    "min_num_params": _UNITS,
    "state_dict_type": "checkpoints have a form of their own, and RUN/model is whole",
    "cpu_ram_efficient_loading": "each process reads the model's files",
    "sync_module_states": "each process reads the model's files",
    "use_orig_params": "fsdp2 has no other way",
    "limit_all_gathers": _GATHERED,
    "backward_prefetch": _GATHERED,
    "forward_prefetch": _GATHERED,
    "reshard_after_forward": _GATHERED,
    "cpu_offload_pin_memory": "where the weights wait changes no result",
    "mixed_precision_policy": "training.mixed_precision says it",
}
_HINT = "set distributed.strategy by --set (zero2 shares less than fsdp2, ddp nothing)"


def use_fsdp(translation: Translation, key: str, value: Any) -> None:
    """`full_shard auto_wrap`, a list of such words, or true."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    if value is True:
        words = ["true"]
    others = [word for word in words if word not in (*_WORDS, "offload")]
    if not words:
        translation.tell(key, "off, same here")
    elif others:
        translation.refuse(key, f"no counterpart of {others[0]}: {_HINT}, and --drop {key}")
    else:
        translation.put(key, "distributed.strategy", "fsdp2")
        if "offload" in words:
            translation.put(key, "distributed.offload", "parameters")


def use_fsdp_config(*, needs_fsdp: bool) -> Any:
    """needs_fsdp: their trainer reads the mapping only where `fsdp` is on."""

    def handle(translation: Translation, key: str, value: Any) -> None:
        if not value or (needs_fsdp and not translation.get(key.removesuffix("_config"))):
            translation.tell(key, "not used: fsdp is off")
            return
        if not isinstance(value, dict):
            translation.refuse(key, "must be a mapping: put the file's content there")
            return
        translation.put(key, "distributed.strategy", "fsdp2")
        for name, setting in value.items():
            _use_part(translation, key, name, setting)

    return handle


def _use_part(translation: Translation, key: str, name: str, value: Any) -> None:
    part, plain = f"{key}.{name}", name.removeprefix("fsdp_")
    if plain in ("offload_params", "activation_checkpointing"):
        if not value:
            translation.tell(part, "off")
        elif plain == "offload_params":
            translation.put(part, "distributed.offload", "parameters")
        else:
            translation.put(part, "training.gradient_checkpointing", True)
    elif plain == "sharding_strategy" or (
        plain == "reshard_after_forward" and isinstance(value, str)
    ):
        if str(value).lower() in _SHARED:
            translation.tell(part, "fsdp2 shares optimizer, gradients and weights")
        else:
            translation.refuse(part, f"{value}: no counterpart: {_HINT}, and --drop {part}")
    elif plain in _OURS:
        translation.tell(part, f"{value}: no setting needed: {_OURS[plain]}")
    else:
        translation.refuse(part, f"{value}: is not known here; --drop {part} leaves it out")


FSDP: Table = {
    "fsdp": use_fsdp,
    "fsdp_config": use_fsdp_config(needs_fsdp=True),
    "fsdp_transformer_layer_cls_to_wrap": Ours(_OURS["transformer_layer_cls_to_wrap"]),
}
