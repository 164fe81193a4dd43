"""The schedules of the learning rate: transformers' own, under its names, with settings checked.

Every one that has a warmup starts at 0 (cosine_warmup_with_min_lr and warmup_stable_decay: at a
share of the learning rate) and rises in a line to `learning_rate`. Those that follow a metric
(reduce_lr_on_plateau, greedy) are left out: they would depend on when one evaluates.
"""

from fractions import Fraction
from math import ceil
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from post_training.config.model import Config

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
