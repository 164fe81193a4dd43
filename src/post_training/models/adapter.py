"""A low-rank adapter (LoRA) on a model: added before training, saved alone, merged at the end.

W x becomes W x + (alpha / rank) B A x with A [rank, in] and B [out, rank], and only A and B are
trained. B starts at 0, so the adapted model starts as the model that it adapts. A and B are float32
whatever W is, but for ZeRO-3, which wants one dtype.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from post_training.core.errors import UsageError
from post_training.core.files import atomic_directory, read_json_object
from post_training.models.adapter_weights import CONFIG, WEIGHTS
from post_training.models.load import explain_errors
from post_training.models.save import explain_write_errors, remove_places
from post_training.models.weight_files import open_weights

_KEY = "lora.target_modules"


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | None,
    seed: int,
    in_float32: bool = True,
) -> PeftModel:
    """The model with an adapter drawn from `seed`; only the adapter can be trained.

    target_modules: names of linear layers; None: all of them but the output layer.
    in_float32: whether A and B are, whatever the model is.
    Errors: UsageError for a layer that isn't there or can't have one.
    """
    if target_modules is not None:
        _check_targets(model, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    model.name_or_path = ""  # else the place would be a part of each adapter_config.json
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
        except ValueError as error:
            kind = model.config.model_type
            line = str(error).strip().splitlines()[0]
            if "lora_dropout" in line:  # of experts, whose matrices are no linear layers
                raise UsageError(
                    f"the experts of a {kind} can have no dropout (got {dropout:g}, must be 0)",
                    where="lora.dropout",
                    hint="set it to 0, or name linear layers alone in lora.target_modules",
                ) from error
            problem = f"models of the type {kind} can't have this adapter: "
            raise UsageError(problem + line, where=_KEY) from error
    # PEFT keeps the names as a set, and writes adapter_config.json in its order: another in each
    # process, unless PYTHONHASHSEED is set.
    settings = adapted.peft_config[adapted.active_adapter]
    for name in ("target_modules", "target_parameters"):
        if isinstance(names := getattr(settings, name, None), set):
            setattr(settings, name, sorted(names))
    adapted.create_or_update_model_card = lambda *_: None  # a README about PEFT
    return adapted


@dataclass(frozen=True)
class Coverage:
    """How many matrices of each kind have an adapter, and how many have none: {name within a
    layer: number}. Embedding and output layer, which never have one, are left out."""

    adapted: dict[str, int]
    plain: dict[str, int]

    def __str__(self) -> str:
        """`lora: on 2 of 2 self_attn.q_proj, …; none on 2 mlp.gate`"""
        numbers = {kind: self.adapted[kind] + self.plain.get(kind, 0) for kind in self.adapted}
        on = [f"{self.adapted[kind]} of {number} {kind}" for kind, number in numbers.items()]
        none = [f"{n} {kind}" for kind, n in self.plain.items() if kind not in self.adapted]
        return f"on {', '.join(on)}" + (f"; none on {', '.join(none)}" if none else "")


def coverage(adapted: PeftModel) -> Coverage:
    """PEFT decides for experts by itself where their adapters are, and tells nobody."""
    tuner = adapted.base_model
    named = (*tuner.targeted_module_names, *tuner.targeted_parameter_names)
    targeted = {name.removesuffix(".weight") for name in named}
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name in _matrices(adapted):
        found[name in targeted][_kind(name)] += 1
    return Coverage(dict(found[True]), dict(found[False]))


def _matrices(adapted: PeftModel) -> Iterator[str]:
    """Names in the model as it was, without the adapter's own and `.weight` at the end."""
    model = adapted.get_base_model()
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    for name, weights in model.named_parameters():
        # ZeRO-3 leaves the shape of a divided one elsewhere.
        is_matrix = len(getattr(weights, "ds_shape", weights.shape)) >= 2
        if is_matrix and ".lora_" not in name and not any(weights is end for end in ends):
            yield re.sub(r"\.base_layer\b", "", name).removesuffix(".weight")


def _kind(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`; further numbers are told as N."""
    within = re.sub(r"^.*?\.\d+\.", "", name)
    return re.sub(r"\b\d+\b", "N", within)


def save_adapter(
    path: Path, adapted: PeftModel, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; replaces `path` whole.

    weights: of the adapted model, gathered from where they were sharded; by default its own.
    """
    shutil.rmtree(path, ignore_errors=True)
    with explain_write_errors(path.parent), atomic_directory(path) as temporary:
        adapted.save_pretrained(temporary, state_dict=weights)
        remove_places(temporary)


def merge_adapter(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The model that was adapted, W + (alpha / rank) B A in the dtype of W: rounded once.

    model: as it was before the adapter was added, on the CPU. path: an adapter's folder.
    Errors: PostTrainingError for a folder that is none, or the adapter of another model.
    """
    read_json_object(path / CONFIG)
    names = open_weights(path, WEIGHTS).keys()
    with explain_errors(path, "the adapter can't be added to the model"):
        adapted = PeftModel.from_pretrained(model, path)
        # PEFT only warns of what it did not find, and is silent about what it did not use.
        matrices = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if missing := sorted(matrices - names):
            raise ValueError(f"it lacks {len(missing)} matrices: {missing[0]}, …")
        if unused := sorted(names - matrices - adapted.state_dict().keys()):
            raise ValueError(f"the model has no place for {len(unused)}: {unused[0]}, …")
        return adapted.merge_and_unload(safe_merge=True)


def _check_targets(model: PreTrainedModel, names: list[str]) -> None:
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    for name in names:
        if name not in linear:
            is_output = model.get_output_embeddings() is dict(model.named_modules()).get(name)
            raise UsageError(
                f"no such linear layer: {name} (there are {', '.join(sorted(linear))})"
                if not is_output
                else f"{name}, the output layer, can have no adapter: the loss reads its weights",
                where=_KEY,
            )
