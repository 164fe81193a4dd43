"""A model with a LoRA adapter added to its weights, tensor by tensor: W + s B A.

s is alpha / rank, or alpha / √rank for rsLoRA (Kalajdzievski 2023). Computed in float64 and rounded
once, to the dtype of W. Nothing but the matrices of LoRA is read: an adapter that has more is
refused, as a model without it would be another.
"""

import re
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from post_training.core.errors import PostTrainingError
from post_training.core.files import read_json_object
from post_training.models.lazy_tensors import LazyTensor
from post_training.models.weight_files import open_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# {setting: the values with which an adapter is the plain one}
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
    # The others change the base too (pissa, olora, loftq, …): added to it as it is on disk, their
    # matrices would count twice.
    "init_lora_weights": (True, None, False, "gaussian", "eva", "orthogonal"),
}


def with_adapter(folder: Path, base: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The weights of `base` with the adapter of the folder in them.

    Errors: PostTrainingError for an adapter that is more than LoRA, or of another model.
    """
    settings = read_json_object(folder / CONFIG)
    for name, allowed in _ONLY.items():
        if (value := settings.get(name)) not in allowed:
            raise PostTrainingError(
                f"{name} is {value!r}, must be {allowed[0]!r}: only plain LoRA is added",
                where=str(folder / CONFIG),
            )
    rank, alpha = (settings.get(name) for name in ("r", "lora_alpha"))
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise PostTrainingError(
            f"r and lora_alpha must be a number > 0 and a number (got {rank!r} and {alpha!r})",
            where=str(folder / CONFIG),
        )
    scale = alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in open_weights(folder, WEIGHTS).items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise PostTrainingError(f"{name} is no matrix of LoRA", where=str(folder / WEIGHTS))
        pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
    weights = dict(base)
    for name, pair in pairs.items():
        if name not in base or pair.keys() != {"A", "B"}:
            problem = "the model has no such weight" if name not in base else "A or B is missing"
            raise PostTrainingError(f"{name}: {problem}", where=str(folder / WEIGHTS))
        expected = (pair["B"].shape[0], pair["A"].shape[1])
        if base[name].shape != expected or pair["A"].shape[0] != pair["B"].shape[1]:
            raise PostTrainingError(
                f"{name} is {list(base[name].shape)} in the model, {list(expected)} in the adapter",
                where=str(folder / WEIGHTS),
            )
        weights[name] = _added(base[name], pair["A"], pair["B"], scale)
    return weights


def _added(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    def read() -> Tensor:
        product = b.read().double() @ a.read().double()
        return weight.read().double().add_(product, alpha=scale).to(weight.dtype)

    return LazyTensor(weight.shape, weight.dtype, read)
