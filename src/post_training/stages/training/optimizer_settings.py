"""The optimizers by name, and the settings of each. They are made in optimizers.py.

weight_decay is decoupled from the gradient in adamw, adamw_torch, ademamix, lion and adafactor; in
sgd, rmsprop and adagrad it is part of the gradient (L2), as torch has it.
"""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from post_training.config.model import Config

_Decay = Annotated[float, Field(ge=0, lt=1)]
_Betas = tuple[_Decay, _Decay]


class AdamW(Config):
    betas: _Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class AdEMAMix(AdamW):
    """AdamW with a second, slow average of the gradients (https://arxiv.org/abs/2409.03137).

    beta3: its decay. alpha: its weight beside the fast one. t_alpha_beta3: the steps over which
    both grow to these values; by default those of the whole run, and 1 turns it off.
    """

    beta3: Annotated[float, Field(gt=0, lt=1)] = 0.999
    alpha: NonNegativeFloat = 8.0
    t_alpha_beta3: PositiveInt | None = None

    @model_validator(mode="after")
    def _slow_is_slower(self) -> "AdEMAMix":
        if not 0 < self.betas[0] <= self.beta3:
            raise ValueError(f"betas[0]: must be > 0 and <= beta3 (got {self.betas[0]})")
        return self


class Lion(Config):
    betas: _Betas = (0.9, 0.99)


class Adafactor(Config):
    """With the learning rate of the schedule: none of its own, and not scaled by parameters."""

    eps: tuple[PositiveFloat, PositiveFloat] = (1e-30, 1e-3)
    clip_threshold: PositiveFloat = 1.0
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    beta1: _Decay | None = None


class Sgd(Config):
    momentum: _Decay = 0.0
    dampening: NonNegativeFloat = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov(self) -> "Sgd":
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: needs a momentum > 0 and no dampening")
        return self


class RmsProp(Config):
    alpha: _Decay = 0.99
    eps: PositiveFloat = 1e-8
    momentum: _Decay = 0.0
    centered: bool = False


class Adagrad(Config):
    lr_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-10


# adamw: torch's fused kernel. adamw_torch: its other one, whose last bits are different.
OPTIMIZERS: dict[str, type[Config]] = {
    "adamw": AdamW,
    "adamw_torch": AdamW,
    "ademamix": AdEMAMix,
    "lion": Lion,
    "adafactor": Adafactor,
    "sgd": Sgd,
    "rmsprop": RmsProp,
    "adagrad": Adagrad,
}
# One optimizer, one name: it is part of the recipe.
_OTHER_NAMES = {"adamw_torch_fused": "adamw"}
# Further names that transformers knows, by what it would need for them.
NOT_HERE: dict[str, tuple[str, ...]] = {
    "bitsandbytes": (
        "adamw_bnb_8bit",
        "adamw_8bit",
        "ademamix_8bit",
        "lion_8bit",
        "lion_32bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
    ),
    "galore-torch": (
        "galore_adamw",
        "galore_adamw_8bit",
        "galore_adafactor",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
    ),
    "apollo-torch": ("apollo_adamw", "apollo_adamw_layerwise"),
    "schedulefree": ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "lomo-optim": ("lomo", "adalomo"),
    "grokadamw": ("grokadamw",),
    "torch-optimi": ("stable_adamw",),
    "torchdistx": ("adamw_anyprecision",),
    "torch-xla": ("adamw_torch_xla",),
    "torch-npu": ("adamw_torch_npu_fused",),
}


def known_optimizer(name: object) -> object:
    """Our name of an optimizer. Errors: ValueError for one that needs a package no image has."""
    for package, names in NOT_HERE.items():
        if name in names:
            raise ValueError(
                f"{name} needs {package}, which the images don't have "
                f"(they have {', '.join(OPTIMIZERS)})"
            )
    return _OTHER_NAMES.get(name, name) if isinstance(name, str) else name
