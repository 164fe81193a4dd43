"""Write `RUN/model` from several models, or from a model and adapters (models/merging.py).

every model: its weights' names and sizes, its settings, its tokenizer
    -> all alike? -> tensor by tensor -> the settings and tokenizer of the base, or of the first
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, remove_leftovers, write_json
from post_training.models.adapter_weights import CONFIG, with_adapter
from post_training.models.lazy_tensors import LazyTensor
from post_training.models.load import DTYPES_OF_WEIGHTS, load_tokenizer, read_model_settings
from post_training.models.merging import Merge, merge_tensor
from post_training.models.save import explain_write_errors, remove_places
from post_training.models.weight_files import open_weights, write_weights
from post_training.stages.context import Progress, Result, StageContext
from post_training.stages.weights.config import MergeConfig

# Of config.json: what says nothing of what the weights mean.
_OWN = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_OWN |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def run(config: MergeConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _merge(config, context))
    return Result(artifacts={"model": "model"}, metrics=metrics)


def _merge(config: MergeConfig, context: StageContext) -> dict[str, Any]:
    folders = [model.path for model in config.models]
    base = None if config.base is None else _finite(config.base, open_weights(config.base))
    models = [_finite(folder, _weights(folder, base)) for folder in folders]
    whole = [folder for folder in folders if not (folder / CONFIG).exists()]
    compared = ([] if config.base is None else [config.base]) + whole
    first = compared[0]
    weights_of_first = models[folders.index(first)] if base is None else base
    for folder, weights in zip(folders, models, strict=True):
        _check_alike(folder, weights, first, weights_of_first)
    settings = _same_settings(compared)
    tokenizer = _same_tokenizer(compared, config.tokenizer)
    dtype = _dtype(config.dtype, folders + compared, [*models, weights_of_first])
    merge = Merge(
        config.method,
        [model.weight for model in config.models],
        [model.density for model in config.models],
        config.t,
        config.scale,
        config.seed,
    )
    written = [
        (name, _merged(merge, name, [each[name] for each in models], base, dtype, folders))
        for name in weights_of_first
    ]
    remove_leftovers(context.run_dir, "model")
    target = context.run_dir / "model"
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    writing = explain_write_errors(context.run_dir, "begins anew")
    with writing, atomic_directory(target) as folder:
        with Progress("tensor", len(written), shown=True) as progress:
            limit = int(config.max_file_size_gb * 1e9)
            size = write_weights(folder, written, limit, progress.update)
        name = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", {**settings, "dtype": name})
        if (first / "generation_config.json").exists():
            shutil.copyfile(first / "generation_config.json", folder / "generation_config.json")
        tokenizer.save_pretrained(folder)
        remove_places(folder)
    context.log(f"{config.method} of {len(models)}: {len(written):,} tensors, {size / 1e9:.2f} GB")
    return {"num_tensors": len(written), "size_bytes": size}


def _weights(folder: Path, base: dict[str, LazyTensor] | None) -> dict[str, LazyTensor]:
    if not (folder / CONFIG).exists():
        return open_weights(folder)
    if base is None:
        raise UsageError(
            "is an adapter, and there is no model to add it to",
            where=str(folder),
            hint="set base to the model that it was trained on",
        )
    return with_adapter(folder, base)


def _finite(folder: Path, weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same weights; each is an error, when it is read, where it holds NaN or infinity: the
    methods that keep the largest changes would leave such values out, and nobody would know."""

    def checked(name: str, tensor: LazyTensor) -> Tensor:
        values = tensor.read()
        if not values.isfinite().all():
            raise PostTrainingError(f"{name} holds NaN or infinity", where=str(folder))
        return values

    return {
        name: LazyTensor(tensor.shape, tensor.dtype, partial(checked, name, tensor))
        for name, tensor in weights.items()
    }


def _check_alike(
    folder: Path, weights: dict[str, LazyTensor], first: Path, expected: dict[str, LazyTensor]
) -> None:
    if other := sorted(weights.keys() ^ expected.keys()):
        has, lacks = (folder, first) if other[0] in weights else (first, folder)
        raise PostTrainingError(f"has no weight {other[0]}, which is in {has}", where=str(lacks))
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise PostTrainingError(
                f"{name} is {list(tensor.shape)}, and {list(expected[name].shape)} in {first}",
                where=str(folder),
                hint="models with vocabularies of different sizes can't be merged",
            )


def _same_settings(folders: list[Path]) -> dict[str, Any]:
    """config.json of the first. Errors: PostTrainingError that names the setting which differs."""
    found = [read_model_settings(folder) for folder in folders]
    for folder, settings in zip(folders[1:], found[1:], strict=True):
        for key in sorted((settings.keys() | found[0].keys()) - _OWN):
            if settings.get(key) != found[0].get(key):
                raise PostTrainingError(
                    f"{key} is {settings.get(key)!r}, and {found[0].get(key)!r} in {folders[0]}",
                    where=str(folder / "config.json"),
                    hint="the weights were trained for another model: change config.json in a copy",
                )
    return {key: value for key, value in found[0].items() if key != "torch_dtype"}


def _same_tokenizer(folders: list[Path], chosen: Path | None) -> Any:
    """The tokenizer of the result. A token has to have one id in all models; the templates may
    differ where it was said which one to take.

    Errors: PostTrainingError.
    """
    loaded = [load_tokenizer(folder) for folder in folders]
    result = loaded[0] if chosen is None else load_tokenizer(chosen)
    for folder, tokenizer in zip(folders, loaded, strict=True):
        if tokenizer.get_vocab() != result.get_vocab():
            own, other = tokenizer.get_vocab(), result.get_vocab()
            token = min(
                token for token in own.keys() | other.keys() if own.get(token) != other.get(token)
            )
            raise PostTrainingError(
                f"the token {token!r} has the id {own.get(token)}, and {other.get(token)} in "
                f"{chosen or folders[0]}",
                where=str(folder),
                hint="rows of the embeddings would be mixed with those of other tokens",
            )
        if chosen is None and tokenizer.chat_template != result.chat_template:
            raise PostTrainingError(
                f"its chat template is not that of {folders[0]}",
                where=str(folder),
                hint="`tokenizer: FOLDER` says whose tokenizer and template the result has",
            )
    return result


def _dtype(asked: str, folders: list[Path], models: list[dict[str, LazyTensor]]) -> torch.dtype:
    found: dict[torch.dtype, Path] = {}
    for folder, weights in zip(folders, models, strict=False):
        for tensor in weights.values():
            if tensor.dtype.is_floating_point:
                found.setdefault(tensor.dtype, folder)
    if asked != "keep":
        return DTYPES_OF_WEIGHTS[asked]
    if not found:
        raise PostTrainingError("none of its weights is in floating point", where=str(folders[0]))
    if len(found) > 1:
        kinds = ", ".join(f"{dtype} in {folder}" for dtype, folder in found.items())
        raise UsageError(
            f"the weights have several dtypes: {kinds}", where="dtype", hint="set dtype"
        )
    return next(iter(found))


def _merged(
    merge: Merge,
    name: str,
    models: list[LazyTensor],
    base: dict[str, LazyTensor] | None,
    dtype: torch.dtype,
    folders: list[Path],
) -> LazyTensor:
    if models[0].dtype.is_floating_point:
        return merge_tensor(merge, name, models, None if base is None else base[name], dtype)
    first = models[0].read()
    for folder, model in zip(folders[1:], models[1:], strict=True):
        if not torch.equal(first, model.read()):
            raise PostTrainingError(
                f"{name} holds integers, and others in {folders[0]}", where=str(folder)
            )
    return models[0]
