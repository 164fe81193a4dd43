"""Write `RUN/model` from a checkpoint of Megatron-LM or GPT-NeoX, or `RUN/checkpoint` for Megatron.

read the settings -> check every tensor's name and size -> write tensor by tensor
                  -> settings and tokenizer
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, read_json_object, remove_leftovers
from post_training.models.conversion import megatron, megatron_folder, neox
from post_training.models.conversion.architectures import (
    Shape,
    check_tensors,
    megatron_tensors,
    rows,
    to_huggingface,
)
from post_training.models.conversion.megatron import Checkpoint
from post_training.models.conversion.settings import (
    arguments_of_config,
    config_of_arguments,
    shape_of_arguments,
    shape_of_config,
)
from post_training.models.lazy_tensors import LazyTensor, sum_of
from post_training.models.load import (
    DTYPES_OF_WEIGHTS,
    explain_errors,
    load_tokenizer,
    read_config,
)
from post_training.models.save import explain_write_errors, remove_places
from post_training.models.weight_files import open_weights, write_weights
from post_training.stages.context import Progress, Result, StageContext
from post_training.stages.weights.config import ConvertConfig, MegatronConfig

_EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")
# Constants of xIELU, which transformers saves with the weights.
_XIELU = {"beta": 0.5, "eps": -1e-6}


def run(config: ConvertConfig, context: StageContext) -> Result:
    kind = "model" if config.to == "huggingface" else "checkpoint"
    convert = _to_huggingface if config.to == "huggingface" else _to_megatron
    metrics = context.on_writer(lambda: _write(config, context, kind, convert))
    return Result(artifacts={kind: kind}, metrics=metrics)


def _write(
    config: ConvertConfig,
    context: StageContext,
    kind: str,
    convert: Callable[[ConvertConfig, StageContext, Path], dict[str, Any]],
) -> dict[str, Any]:
    remove_leftovers(context.run_dir, kind)
    target = context.run_dir / kind
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    writing = explain_write_errors(context.run_dir, "begins anew")
    with writing, atomic_directory(target) as folder:
        return convert(config, context, folder)


def _to_huggingface(config: ConvertConfig, context: StageContext, folder: Path) -> dict[str, Any]:
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    read, shape, describe = _read_all(config, context)
    embeddings = read.tensors[_EMBEDDINGS[0]]
    dtype = _dtype(config.dtype, embeddings.dtype)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    vocabulary = _vocabulary(config.vocab_size, num_tokens, embeddings.shape[0])
    if vocabulary < embeddings.shape[0]:
        context.log(
            f"vocabulary: {vocabulary:,} of {embeddings.shape[0]:,} rows; the rest is padding"
        )
    with explain_errors(config.checkpoint, "no config.json can be made of its settings"):
        settings = describe(vocabulary, dtype)
    if config.config is not None:
        settings = _replaced(settings, config.config, context)
    special = _special_tokens(config, tokenizer, vocabulary, context)
    for key, ids in special.items():
        setattr(settings, key, ids)
    named = _named(read, shape, vocabulary)
    _say_what_is_cast(named, dtype, config, context)
    written = [(name, tensor.cast(dtype, name)) for name, tensor in named]
    with Progress("tensor", len(written), shown=True) as progress:
        size = write_weights(folder, written, int(config.max_file_size_gb * 1e9), progress.update)
    settings.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    remove_places(folder)
    num_parameters = sum(torch.Size(tensor.shape).numel() for _, tensor in written)
    context.log(
        f"{shape.family} with {num_parameters:,} parameters in {settings.dtype}: "
        f"{len(written):,} tensors, {size / 1e9:.2f} GB"
    )
    return {"num_parameters": num_parameters, "num_tensors": len(written), "size_bytes": size}


def _say_what_is_cast(
    named: list[tuple[str, LazyTensor]],
    dtype: torch.dtype,
    config: ConvertConfig,
    context: StageContext,
) -> None:
    """`keep` keeps the dtype of the embeddings, which may not be that of all."""
    others = [(name, tensor.dtype) for name, tensor in named if tensor.dtype != dtype]
    if others and config.dtype == "keep":
        (name, found), *_ = others
        context.log(
            f"{len(others):,} of {len(named):,} tensors become {dtype}, as the embeddings are: "
            f"{name} was {found}"
        )


Describe = Callable[[int, torch.dtype], PreTrainedConfig]


def _read_all(config: ConvertConfig, context: StageContext) -> tuple[Checkpoint, Shape, Describe]:
    """The checkpoint, or the mean of several; its shape; what gives its config.json."""
    read, shape, describe = _read(config, context, config.checkpoint)
    if not config.average_with:
        return read, shape, describe
    others = [_read(config, context, folder) for folder in config.average_with]
    for folder, (_, other, _) in zip(config.average_with, others, strict=True):
        if other != shape:
            changed = next(key for key in vars(shape) if vars(shape)[key] != vars(other)[key])
            raise PostTrainingError(
                f"{changed} is {vars(other)[changed]}, must be {vars(shape)[changed]} as in "
                f"{config.checkpoint}: a mean needs one model",
                where=str(folder),
            )
    every = [read.tensors, *(other.tensors for other, _, _ in others)]
    # Of a tied model, one may also have a copy of the embeddings, which is not used.
    names = [name for name in read.tensors if all(name in tensors for tensors in every)]
    for folder, tensors in zip(config.average_with, every[1:], strict=True):
        _check_alike(folder, {name: tensors[name] for name in names}, read.tensors, config)
    read.tensors = {name: sum_of([each[name] for each in every], len(every)) for name in names}
    context.log(f"the mean of {len(every)} checkpoints")
    return read, shape, describe


def _check_alike(
    folder: Path,
    tensors: dict[str, LazyTensor],
    first: dict[str, LazyTensor],
    config: ConvertConfig,
) -> None:
    """Errors: PostTrainingError for a checkpoint whose tensors are not those of the first."""
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (first[name].shape, first[name].dtype):
            raise PostTrainingError(
                f"{name} is {list(tensor.shape)} in {tensor.dtype}, must be "
                f"{list(first[name].shape)} in {first[name].dtype} as in {config.checkpoint}: a "
                "mean needs one model",
                where=str(folder),
            )


def _read(
    config: ConvertConfig, context: StageContext, folder: Path
) -> tuple[Checkpoint, Shape, Describe]:
    notes: list[str] = []
    average = config.differing_copies == "average"

    def merge(name: str, copies: list[LazyTensor]) -> LazyTensor:
        return megatron.one_of_copies(name, copies, average=average, notes=notes)

    # Settings come from other people's files, and may be of any type.
    with explain_errors(folder, "can't be read as a checkpoint"):
        read, shape, describe = _open(folder, config.neox_configs, merge)
        check_tensors(shape, read.tensors, str(folder))
    for note in notes:
        context.log(note)
    for what, number in read.left_out.items():
        context.log(f"{folder}: {number} entries are no weights, and left out: {what}")
    context.log(f"{folder}: {read.layout}, {shape.family}, {shape.layers} layers")
    return read, shape, describe


def _open(
    folder: Path, neox_configs: list[Path], merge: Callable[[str, list[LazyTensor]], LazyTensor]
) -> tuple[Checkpoint, Shape, Describe]:
    """Errors: PostTrainingError for a folder of another kind, and those of its reader."""
    where = str(folder)
    if megatron.is_megatron(folder):
        read = megatron.read_megatron(folder, merge)
        shape = shape_of_arguments(read.settings, where)
        return read, shape, partial(config_of_arguments, shape, read.settings)
    if neox.is_neox(folder):
        settings = neox.read_settings(folder, neox_configs)
        read = neox.read_neox(folder, settings, merge)
        shape = neox.shape_of_tensors(read.tensors, settings, where)
        return read, shape, partial(neox.config_of_settings, shape, settings, where)
    of_huggingface = (folder / "config.json").exists()
    raise PostTrainingError(
        "neither a checkpoint of Megatron-LM (mp_rank_00/, common.pt) nor of GPT-NeoX "
        "(layer_00-model_00-model_states.pt)",
        where=where,
        hint="it is a model of Hugging Face already; to: megatron converts it"
        if of_huggingface
        else "name the folder of one checkpoint, or the one above with its `latest`",
    )


def _dtype(asked: str, found: torch.dtype) -> torch.dtype:
    return found if asked == "keep" else DTYPES_OF_WEIGHTS[asked]


def _vocabulary(asked: str | int, num_tokens: int, num_rows: int) -> int:
    wanted = {"tokenizer": num_tokens, "padded": num_rows}.get(str(asked), asked)
    assert isinstance(wanted, int)
    if wanted > num_rows:
        raise UsageError(
            f"the model has {num_rows:,} tokens, and "
            + (
                f"the tokenizer {num_tokens:,}"
                if asked == "tokenizer"
                else f"{wanted:,} are asked for"
            ),
            where="tokenizer" if asked == "tokenizer" else "vocab_size",
            hint="name the tokenizer that the model was trained with",
        )
    if wanted < num_tokens:
        raise UsageError(
            f"must be ≥ {num_tokens:,}, the tokens of the tokenizer (got {wanted:,})",
            where="vocab_size",
        )
    return wanted


def _special_tokens(
    config: ConvertConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    context: StageContext,
) -> dict[str, int | list[int] | None]:
    """Those that `config` names, for the end of a text perhaps several; else the tokenizer's.

    Errors: PostTrainingError for one that the model has no row for."""
    given = {} if config.config is None else read_json_object(config.config)
    found: dict[str, int | list[int] | None] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own, named = getattr(tokenizer, key), given.get(key)
        found[key] = own if named is None else named
        if named is None:
            continue
        ids = named if isinstance(named, list) else [named]
        if not ids or any(type(each) is not int or each < 0 for each in ids):
            raise PostTrainingError(
                f"{key}: must be the id of a token, or a list of ids (got {named!r})",
                where=str(config.config),
            )
        if own is not None and own not in ids:
            context.log(f"{config.config}: {key}: {named} is taken; of the tokenizer it is {own}")
        if max(ids) >= vocabulary:
            raise PostTrainingError(
                f"{key}: must be < {vocabulary:,}, the tokens of the model (got {max(ids):,})",
                where=str(config.config),
            )
    assert config.tokenizer is not None
    if (unread := config.tokenizer / "generation_config.json").exists():
        context.log(f"{unread}: not read: special tokens are those of `config` or the tokenizer")
    return found


def _replaced(found: PreTrainedConfig, path: Path, context: StageContext) -> PreTrainedConfig:
    """The settings of the file over those of the checkpoint; sizes have to agree."""
    given = read_json_object(path)
    if given.get("model_type") != found.model_type:
        raise UsageError(
            f"model_type is {given.get('model_type')!r}, the checkpoint is a {found.model_type}",
            where=str(path),
        )
    own = found.to_dict()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "head_dim", "num_local_experts",
                "tie_word_embeddings"):  # fmt: skip
        if key in given and key in own and given[key] != own[key]:
            raise UsageError(
                f"{key} is {given[key]}, and {own[key]} in the checkpoint", where=str(path)
            )
    kept = {
        "vocab_size": found.vocab_size,
        "dtype": found.dtype,
        "architectures": found.architectures,
    }
    for key in sorted(given.keys() & own.keys() - kept.keys() - {"transformers_version"}):
        if given[key] != own[key]:
            context.log(f"{path}: {key}: {own[key]} -> {given[key]}")
    with explain_errors(path, "no settings of this model"):
        return AutoConfig.for_model(**{**own, **given, **kept})


def _named(read: Checkpoint, shape: Shape, vocabulary: int) -> list[tuple[str, LazyTensor]]:
    """Every tensor of the folder, in the order of the model."""
    found: list[tuple[str, LazyTensor]] = []
    for row in rows(shape, read.tensors[_EMBEDDINGS[0]].shape[0]):
        tensor = read.tensors[row.megatron]
        if row.megatron in _EMBEDDINGS and tensor.shape[0] != vocabulary:
            tensor = tensor.rows(0, vocabulary)
        found += to_huggingface(row, tensor, shape)
        if row.megatron.endswith("activation_func.alpha_n"):
            prefix = row.names[0].removesuffix("alpha_n")
            found += [
                (f"{prefix}{name}", _constant(value, tensor.dtype))
                for name, value in _XIELU.items()
            ]
    return found


def _constant(value: float, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor((), dtype, lambda: torch.tensor(value, dtype=dtype))


def _to_megatron(config: ConvertConfig, context: StageContext, folder: Path) -> dict[str, Any]:
    source = config.checkpoint
    if megatron.is_megatron(source) or neox.is_neox(source):
        raise UsageError(
            "a checkpoint of Megatron-LM or GPT-NeoX, must be a model of Hugging Face",
            where=str(source),
            hint="convert it to: huggingface first, and what that makes to: megatron",
        )
    settings = read_config(source)
    with explain_errors(source, "no arguments of Megatron can be made of its config.json"):
        shape = shape_of_config(settings, str(source))
        arguments = arguments_of_config(settings, shape, str(source))
    models = [open_weights(each) for each in (source, *config.average_with)]
    for each, weights in zip(config.average_with, models[1:], strict=True):
        if other := sorted(weights.keys() ^ models[0].keys()):
            has, lacks = (each, source) if other[0] in weights else (source, each)
            problem = f"has no weight {other[0]}, which is in {has}"
            raise PostTrainingError(problem, where=str(lacks))
        _check_alike(each, weights, models[0], config)
    weights = {name: sum_of([each[name] for each in models], len(models)) for name in models[0]}
    vocabulary, joined = megatron_tensors(shape, weights, str(source))
    ours = config.megatron
    divisor = ours.make_vocab_size_divisible_by * ours.tensor_parallel_size
    padded = -(-vocabulary // divisor) * divisor
    dtype = _dtype(config.dtype, joined[0][1].dtype)
    megatron_folder.check_ranks(
        shape,
        ours.tensor_parallel_size if ours.format == "torch" else 1,
        ours.pipeline_parallel_size,
        ours.expert_parallel_size,
        padded,
    )
    _say_what_is_cast(joined, dtype, config, context)
    tensors = {}
    for name, each in joined:
        tensor = each.cast(dtype, name)
        tensors[name] = tensor.padded_rows(padded) if name in _EMBEDDINGS else tensor
    arguments |= {
        **_arguments_of_ranks(ours),
        "padded_vocab_size": padded,
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": ours.make_vocab_size_divisible_by,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    write = (
        megatron_folder.write_dist if ours.format == "torch_dist" else megatron_folder.write_ranks
    )
    with Progress("tensor", None, shown=True) as progress:
        write(folder, tensors, arguments, shape, progress.update)
    num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    context.log(
        f"{shape.family} with {num_parameters:,} parameters; {padded - vocabulary:,} rows of "
        "padding"
    )
    return {"num_parameters": num_parameters, "num_tensors": len(tensors)}


def _arguments_of_ranks(ours: MegatronConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": ours.tensor_parallel_size if ours.format == "torch" else 1,
        "pipeline_model_parallel_size": ours.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": ours.expert_parallel_size,
        "expert_tensor_parallel_size": ours.tensor_parallel_size if ours.format == "torch" else 1,
        "transformer_impl": ours.transformer_impl,
    }
