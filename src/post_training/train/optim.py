"""The optimizers by name, and the settings of each. They are made in optimizers.py.

weight_decay is decoupled from the gradient in adamw, adamw_torch, ademamix, lion and adafactor; in
sgd, rmsprop and adagrad it is part of the gradient (L2), as torch has it.
"""

from fractions import Fraction
from math import ceil
from typing import Annotated, Any, Literal

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


# The schedules of the learning rate: transformers' own, under its names, with settings checked.
#
# Every one that has a warmup starts at 0 (cosine_warmup_with_min_lr and warmup_stable_decay: at a
# share of the learning rate) and rises in a line to `learning_rate`. Those that follow a metric
# (reduce_lr_on_plateau, greedy) are left out: they would depend on when one evaluates.


_Shape = Literal["linear", "cosine", "1-sqrt"]


class NoSettings(Config):
    pass


class Cosine(Config):
    """num_cycles: 0.5 goes down once."""

    num_cycles: PositiveFloat = 0.5


class CosineWithRestarts(Config):
    num_cycles: PositiveInt = 1


class CosineWithMinimum(Cosine):
    """Ends at min_lr, or at the share min_lr_rate of the learning rate."""

    min_lr: NonNegativeFloat | None = None
    min_lr_rate: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_minimum(self) -> "CosineWithMinimum":
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ValueError("needs min_lr_rate or min_lr, and not both")
        return self


class CosineWarmupWithMinimum(CosineWithMinimum):
    """warmup_lr_rate: the share of the learning rate that warmup starts from; by default that of
    its first step."""

    warmup_lr_rate: float | None = Field(default=None, ge=0, le=1)


class Polynomial(Config):
    """Ends at lr_end."""

    lr_end: NonNegativeFloat = 1e-7
    power: PositiveFloat = 1.0


class InverseSquareRoot(Config):
    """timescale: steps; by default those of the warmup, or 10,000 where there is none."""

    timescale: PositiveInt | None = None


class WarmupStableDecay(Config):
    """num_decay_steps: steps if ≥ 1, else a share of all steps; they are the last ones."""

    num_decay_steps: PositiveFloat
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    warmup_type: _Shape = "linear"
    decay_type: _Shape = "cosine"
    num_cycles: PositiveFloat = 0.5


SCHEDULES: dict[str, type[Config]] = {
    "linear": NoSettings,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "cosine_with_min_lr": CosineWithMinimum,
    "cosine_warmup_with_min_lr": CosineWarmupWithMinimum,
    "polynomial": Polynomial,
    "constant": NoSettings,
    "constant_with_warmup": NoSettings,
    "inverse_sqrt": InverseSquareRoot,
    "warmup_stable_decay": WarmupStableDecay,
}


def check_minimum(settings: dict[str, Any], learning_rate: float) -> None:
    """Errors: ValueError when the schedule would end above where it begins."""
    for name in ("min_lr", "lr_end"):
        if settings.get(name, 0.0) >= learning_rate:
            raise ValueError(
                f"lr_scheduler_kwargs.{name}: must be < learning_rate, {learning_rate:g} "
                f"(got {settings[name]:g})"
            )


def steps_or_share(value: float, num_steps: int) -> int:
    """`value` steps if it is ≥ 1, else that share of `num_steps`: rounded up, but never all."""
    if value >= 1:
        return int(value)
    return min(ceil(decimal(value) * num_steps), num_steps - 1)


def decimal(value: float) -> Fraction:
    """The number as it was written: 0.1 is a tenth, so that rounding up adds nothing to it."""
    return Fraction(repr(value))


def check_steps_or_share(name: str, value: float) -> None:
    """Errors: ValueError for 1.5, which is neither."""
    if value > 1 and value != int(value):
        raise ValueError(f"{name}: must be whole steps, or a share < 1 (got {value})")


def transformers_arguments(
    name: str, settings: dict[str, Any], warmup: float, num_steps: int
) -> dict[str, Any]:
    """What TrainingArguments needs for this schedule over `num_steps`.

    A run shorter than its warmup, as one to try something, ends on the way up.
    Errors: ValueError when warmup and a decay of so many steps don't fit into the run.
    """
    num_warmup_steps = steps_or_share(warmup, num_steps)
    settings = dict(settings)
    num_decay_steps = 0
    if "num_decay_steps" in settings:
        num_decay_steps = steps_or_share(settings["num_decay_steps"], num_steps)
        settings["num_decay_steps"] = num_decay_steps
    if num_decay_steps and num_warmup_steps + num_decay_steps > num_steps:
        raise ValueError(
            f"lr_scheduler_kwargs: {num_warmup_steps} steps of warmup and {num_decay_steps} of "
            f"decay don't fit into {num_steps}"
        )
    if name == "polynomial" and num_warmup_steps == num_steps:  # it would divide by zero
        raise ValueError(
            f"warmup: polynomial needs a step after it (got {warmup:g} of {num_steps})"
        )
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": settings,
        "warmup_steps": num_warmup_steps,
    }
