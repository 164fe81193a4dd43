"""What a model's folder holds and the loaded model has no place for: a vision tower beside the
language model, layers for predicting several tokens at once (`mtp`).

It is not trained, so RUN/model has it as it was, byte for byte, in a file of its own: the folder is
then again of the architecture that config.json named.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from post_training.core.files import write_json
from post_training.models.weight_files import INDEX, WHOLE

_TRAINED, _KEPT = "model-trained.safetensors", "model-kept.safetensors"
# What a language model's names become within another, in the layouts that folders have.
_LAYOUTS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: f"language_model.{name}",
    lambda name: re.sub(r"^model\.", "model.language_model.", name),
)


def note_left_out(model: PreTrainedModel, folder: Path, unexpected: Iterable[str]) -> None:
    """Give the model `left_out`, the names of the weights in its folder that it has no place for.

    unexpected: those that transformers told of; of others it says nothing, as the class of the
    model knows them.
    """
    names = {name for own in _names_by_file(folder).values() for name in own}
    known = model._keys_to_ignore_on_load_unexpected or ()
    loaded = model.state_dict().keys()
    silent = {name for name in names - loaded if any(re.search(pattern, name) for pattern in known)}
    model.left_out = sorted(silent | set(unexpected))


def describe_left_out(model: PreTrainedModel, folder: Path) -> str | None:
    """One line, or None where all of the folder was loaded."""
    names = getattr(model, "left_out", [])
    if not names:
        return None
    kinds = Counter(".".join(re.split(r"\.\d+\.", name)[0].split(".")[:2]) for name in names)
    counts = ", ".join(f"{number} of {kind}" for kind, number in kinds.most_common())
    return f"{folder}: {len(names)} weights are in the folder and not in the model: {counts}"


def keep_left_out(path: Path, base: Path, model: PreTrainedModel) -> str | None:
    """Add to the saved folder `path` what was left out of `base`; or why that can't be.

    Where config.json of `base` is of a model that has the loaded one as a part, the folder becomes
    one of it again.
    """
    left_out = getattr(model, "left_out", [])
    config = json.loads((base / "config.json").read_text())
    is_part = config.get("model_type") != model.config.model_type
    if not left_out and not is_part:
        return None
    files = _names_by_file(base)
    in_base = {name for names in files.values() for name in names}
    kept = in_base & set(left_out)
    saved = {name for names in _names_by_file(path).values() for name in names}
    if is_part:
        renamed = next(
            (each for each in _LAYOUTS if {each(name) for name in saved} | kept == in_base), None
        )
        if renamed is None:
            return (
                f"only the language model is saved, {model.config.model_type}: its weights have "
                f"other names than those of {config.get('model_type')}"
            )
        _become(path, base, config)
        _rename(path, renamed)
    elif saved & kept:
        return "what the model has no place for is not saved: its weights have names of the model's"
    tensors = {}
    for file, names in files.items():
        with safe_open(base / file, "pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in names if name in kept}
    if tensors:
        _add(path, tensors)
    return None


def _become(path: Path, base: Path, config: dict[str, Any]) -> None:
    """Take config.json of `base`, with the dtype of what was trained, and its other settings."""
    dtype = json.loads((path / "config.json").read_text())["dtype"]
    for settings in (config, *(each for each in config.values() if isinstance(each, dict))):
        for key in {"dtype", "torch_dtype"} & settings.keys():
            settings[key] = dtype
    config.setdefault("dtype", dtype)
    write_json(path / "config.json", config)
    for file in base.glob("*processor_config.json"):  # of images, videos and sound
        shutil.copyfile(file, path / file.name)


def _rename(path: Path, renamed: Callable[[str], str]) -> None:
    for file, names in _names_by_file(path).items():
        if all(renamed(name) == name for name in names):
            continue
        tensors = {renamed(name): tensor for name, tensor in load_file(path / file).items()}
        save_file(tensors, path / file, metadata={"format": "pt"})
    if (path / INDEX).exists():
        index = json.loads((path / INDEX).read_text())
        index["weight_map"] = {renamed(name): at for name, at in index["weight_map"].items()}
        write_json(path / INDEX, index)


def _add(path: Path, tensors: dict[str, Tensor]) -> None:
    if not (path / INDEX).exists():
        (path / WHOLE).rename(path / _TRAINED)
    save_file(tensors, path / _KEPT, metadata={"format": "pt"})
    weight_map: dict[str, str] = {}
    size = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            weight_map |= dict.fromkeys(weights.keys(), file.name)
        size += file.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(path / INDEX, index)


def _names_by_file(folder: Path) -> dict[str, list[str]]:
    """{file: names of its weights}, of the safetensors files that transformers would read."""
    if (folder / WHOLE).exists():
        files = [WHOLE]
    else:
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    names = {}
    for file in files:
        with safe_open(folder / file, "pt") as weights:
            names[file] = list(weights.keys())
    return names
