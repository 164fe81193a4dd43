"""The optimizers and the schedules of the learning rate, by name, with the settings of each.

They are made in arguments.py. weight_decay is decoupled from the gradient in adamw, adamw_torch,
ademamix, lion and adafactor; in sgd, rmsprop and adagrad it is part of the gradient (L2), as torch
has it.

The schedules are transformers' own, under its names. Every one that has a warmup starts at 0
(cosine_warmup_with_min_lr and warmup_stable_decay: at a share of the learning rate) and rises in a
line to `learning_rate`. Those that follow a metric (reduce_lr_on_plateau, greedy) are left out:
they would depend on when one evaluates.
"""

from fractions import Fraction
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from post_training.config.model import Config

_Decay = Annotated[float, Field(ge=0, lt=1)]
_Betas = tuple[_Decay, _Decay]
_EPS = "Added to the denominator of the update, against division by 0."


class AdamW(Config):
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    betas: _Betas = Field(
        (0.9, 0.999),
        description="Decays of the averages of the gradient and of its square. At 1 an average "
        "would stand still.",
    )
    eps: PositiveFloat = Field(1e-8, description=_EPS)


class AdEMAMix(AdamW):
    """AdamW with a second, slow average of the gradients (https://arxiv.org/abs/2409.03137)."""

    beta3: float = Field(
        0.999,
        gt=0,
        lt=1,
        description="Decay of the slow average. At least betas[0], the decay of the fast one.",
    )
    alpha: NonNegativeFloat = Field(
        8.0, description="Weight of the slow average beside the fast one."
    )
    t_alpha_beta3: PositiveInt | None = Field(
        None,
        description="Steps over which beta3 and alpha grow to their values. By default those of "
        "the whole run; 1 turns the growth off.",
    )

    @model_validator(mode="after")
    def _slow_is_slower(self) -> "AdEMAMix":
        # The slow decay grows from betas[0] to beta3, along a curve of their logarithms.
        if not 0 < self.betas[0] <= self.beta3:
            raise ValueError(f"betas[0]: must be > 0 and <= beta3 (got {self.betas[0]})")
        return self


class Lion(Config):
    """Lion (https://arxiv.org/abs/2302.06675)."""

    betas: _Betas = Field(
        (0.9, 0.99),
        description="Decay of the average in the update, and of the average that is kept.",
    )


class Adafactor(Config):
    """Adafactor (https://arxiv.org/abs/1804.04235) with the learning rate of the schedule: none of
    its own, and not scaled by parameters."""

    eps: tuple[PositiveFloat, PositiveFloat] = Field(
        (1e-30, 1e-3),
        description="Added to the square of the gradient; the second number has no effect, as "
        "updates are not scaled by parameters.",
    )
    clip_threshold: PositiveFloat = Field(
        1.0, description="Root mean square of an update above which it is scaled down."
    )
    decay_rate: float = Field(
        -0.8,
        lt=0,
        description="Exponent of the decay of the squares' average, 1 − step^decay_rate. Negative: "
        "the average becomes longer with the steps.",
    )
    beta1: _Decay | None = Field(
        None, description="Decay of an average of the updates. By default there is none."
    )


class Sgd(Config):
    """Stochastic gradient descent, as torch has it."""

    momentum: _Decay = Field(0.0, description="Decay of the sum of the gradients. 0: no momentum.")
    dampening: NonNegativeFloat = Field(
        0.0, description="A new gradient counts 1 − dampening in the momentum."
    )
    nesterov: bool = Field(
        False, description="Nesterov's momentum. It needs a momentum > 0 and no dampening."
    )

    @model_validator(mode="after")
    def _nesterov(self) -> "Sgd":
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: needs a momentum > 0 and no dampening")
        return self


class RmsProp(Config):
    """RMSprop, as torch has it."""

    alpha: _Decay = Field(0.99, description="Decay of the average of the squared gradient.")
    eps: PositiveFloat = Field(1e-8, description=_EPS)
    momentum: _Decay = Field(0.0, description="Decay of the sum of the updates. 0: no momentum.")
    centered: bool = Field(
        False,
        description="Divide by an estimate of the gradient's variance, not of its mean square.",
    )


class Adagrad(Config):
    """Adagrad, as torch has it."""

    lr_decay: NonNegativeFloat = Field(
        0.0, description="The learning rate is divided by 1 + (steps so far) × lr_decay."
    )
    eps: PositiveFloat = Field(1e-10, description=_EPS)


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
_OTHER_NAMES = {"adamw_torch_fused": "adamw"}


def normalize_optimizer_name(name: object) -> object:
    """The one name of an optimizer that transformers has under two: it is part of the recipe."""
    return _OTHER_NAMES.get(name, name) if isinstance(name, str) else name


_Shape = Literal["linear", "cosine", "1-sqrt"]


class NoSettings(Config):
    """A schedule without settings of its own."""


class Cosine(Config):
    """Goes down along a cosine to 0."""

    num_cycles: PositiveFloat = Field(
        0.5, description="Waves of the cosine. 0.5: once from the top to the bottom."
    )


class CosineWithRestarts(Config):
    """Goes down along a cosine to 0, several times."""

    num_cycles: PositiveInt = Field(
        1, description="How often it goes down, each time from the learning rate."
    )


class CosineWithMinimum(Cosine):
    """Goes down along a cosine to a minimum."""

    min_lr: NonNegativeFloat | None = Field(
        None, description="Learning rate at the end. Set either min_lr or min_lr_rate."
    )
    min_lr_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Learning rate at the end, as a share of learning_rate. Set either min_lr or "
        "min_lr_rate.",
    )

    @model_validator(mode="after")
    def _one_minimum(self) -> "CosineWithMinimum":
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ValueError("needs min_lr_rate or min_lr, and not both")
        return self


class CosineWarmupWithMinimum(CosineWithMinimum):
    """The same, with a warmup that does not start from 0."""

    warmup_lr_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of learning_rate that warmup starts from. By default that of its first "
        "step.",
    )


class Polynomial(Config):
    """Goes down along a power to lr_end."""

    lr_end: NonNegativeFloat = Field(
        1e-7, description="Learning rate at the end, below learning_rate."
    )
    power: PositiveFloat = Field(1.0, description="The power; 1 is a line.")


class InverseSquareRoot(Config):
    """Goes down as 1 / √step."""

    timescale: PositiveInt | None = Field(
        None,
        description="Steps after the warmup in which the rate falls to 1 / √2 of its top. By "
        "default those of the warmup, or 10,000 where there is none.",
    )


class WarmupStableDecay(Config):
    """Stays at the learning rate, and decays at the end."""

    num_decay_steps: PositiveFloat = Field(
        description="Length of the decay, the last steps: steps if ≥ 1, else a share of all steps."
    )
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Learning rate at both ends, as a share of learning_rate.",
    )
    warmup_type: _Shape = Field("linear", description="Shape of the warmup.")
    decay_type: _Shape = Field("cosine", description="Shape of the decay.")
    num_cycles: PositiveFloat = Field(
        0.5, description="Waves of a cosine shape. 0.5: once from one end to the other."
    )


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
