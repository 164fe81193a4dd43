"""Which model, and how it computes: the `model` block of every stage that loads one."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from post_training.config.latest import newest_model
from post_training.config.model import ADDED_LATER, Config, Role

Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
TrainingAttention = Literal["sdpa", "eager", "varlen", "flash_attention_2", "flex_attention"]


_OF_THE_HUB = ("hub", "revision", "hub_dir")
_FETCHED_DIR = re.compile(r"models--([^/]+)--([^/]+)/([0-9a-f]{40})")


def fetched_model_dir(hub_dir: Path, hub: str, commit: str) -> Path:
    """Where `post-training model fetch` puts a model of the hub, and a run looks for it."""
    return hub_dir / f"models--{hub.replace('/', '--')}" / commit


def fetch_hint(path: Path) -> str | None:
    """How a model that is missing at `path` is fetched; None for another path."""
    found = _FETCHED_DIR.fullmatch("/".join(path.parts[-2:]))
    if found is None:
        return None
    owner, name, commit = found.groups()
    return (
        f"where there is a network, run: post-training model fetch {owner}/{name} "
        f"--revision {commit} --hub-dir {path.parent.parent}"
    )


class ModelConfig(Config):
    """A model, and how it computes."""

    path: Annotated[Path, Role.INPUT, AfterValidator(newest_model)] = Field(
        description="Model folder, as transformers saves it: weights, config.json and tokenizer. "
        "Or a folder above, in which a file `latest` has the name of the model folder. Set either "
        "path, or hub with revision and hub_dir."
    )
    # What counts is the content of `path`, which they name; so they are no recipe.
    hub: Annotated[str | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Instead of path: a model of the hub, OWNER/NAME. `post-training model fetch` "
        "must have fetched it: a run itself downloads nothing.",
    )
    revision: Annotated[str | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        pattern="^[0-9a-f]{40}$",
        description="With hub: its commit, 40 hexadecimal digits; a branch can change. "
        "`post-training model fetch` prints it.",
    )
    hub_dir: Annotated[Path | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None, description="With hub: the folder that `post-training model fetch` filled."
    )
    attn_implementation: Annotated[Attention, Role.TOPOLOGY] = Field(
        "sdpa",
        description="How attention is computed. sdpa and eager work everywhere; the others need a "
        "GPU, and flash_attention_2 also 16 bits and the package flash-attn.",
    )
    # The optimizer's averages have the dtype of the weights. bfloat16 has 8 bits of precision, and
    # an average with a decay of 0.999 moves by less than the last of them.
    dtype: Annotated[Literal["float32", "bfloat16"], Role.TOPOLOGY] = Field(
        "float32",
        description="dtype of the weights. For training, float32 with training.mixed_precision: "
        "bf16 is safe; in bfloat16 slow averages of the optimizer stand still. ZeRO keeps float32 "
        "copies in any case.",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_of_the_hub(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not any(given.get(key) for key in _OF_THE_HUB):
            return given
        values = {key: given.get(key) for key in _OF_THE_HUB}
        if missing := [key for key, value in values.items() if value is None]:
            raise ValueError(f"hub, revision and hub_dir go together: set {', '.join(missing)} too")
        hub, revision, hub_dir = values.values()
        if not (isinstance(hub, str) and isinstance(revision, str)):
            return given  # that is told of the setting itself
        path = str(fetched_model_dir(Path(str(hub_dir)), hub, revision))
        # A configuration that was resolved once says both.
        if given.get("path") not in (None, path):
            raise ValueError(f"set either path or hub (got {given['path']} and {hub})")
        return {**given, "path": path}


class ScoredModelConfig(ModelConfig):
    """A model whose log-probabilities are computed."""

    float32_logits: Annotated[bool, Role.TOPOLOGY, ADDED_LATER] = Field(
        False,
        description="Where matrix products are computed in bfloat16, keep the logits in float32 "
        "instead of rounding them to bfloat16: log-probabilities are then more exact. On NVIDIA's "
        "GPUs torch computes this directly; elsewhere it is slower, and the run says so.",
    )


def check_float32_logits(model: ScoredModelConfig, *, computes_in_16_bits: bool) -> None:
    """Errors: ValueError where float32_logits changes nothing."""
    if model.float32_logits and not computes_in_16_bits:
        raise ValueError(
            "model.float32_logits: logits are float32 already (it is for model.dtype: bfloat16, or "
            "for training.mixed_precision: bf16)"
        )


class TrainedModelConfig(ScoredModelConfig):
    """A model that is trained. It can have an attention that takes whole rows only."""

    attn_implementation: Annotated[TrainingAttention, Role.TOPOLOGY] = Field(
        "sdpa",
        description="How attention is computed. sdpa and eager work everywhere. varlen too: it "
        "computes each sequence of a packed row by itself, on GPUs by PyTorch's own "
        "FlashAttention, in 16 bits. flex_attention needs a GPU, and flash_attention_2 also 16 "
        "bits and the package flash-attn.",
    )
