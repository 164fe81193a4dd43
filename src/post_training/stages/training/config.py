"""Settings that every training stage has."""

from math import ceil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from post_training.config.model import Config, Role
from post_training.stages.config import StageConfig

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr_rate", "num_cycles"),
}


class ModelConfig(Config):
    """path: a model folder, as transformers saves it. dtype: of weights and optimizer state."""

    path: Annotated[Path, Role.INPUT]
    attn_implementation: Annotated[Literal["sdpa", "eager"], Role.TOPOLOGY] = "sdpa"
    dtype: Annotated[Literal["float32", "bfloat16"], Role.TOPOLOGY] = "float32"


class TrainingConfig(Config):
    """effective_batch_size: rows in a step, over all processes and accumulation steps.

    mixed_precision: dtype of the matrix products, whatever the weights'. warmup: steps if ≥ 1, else
    a share of all steps. max_grad_norm: 0 turns clipping off.
    """

    max_steps: PositiveInt | None = None
    num_train_epochs: PositiveFloat | None = None
    effective_batch_size: PositiveInt
    per_device_train_batch_size: Annotated[PositiveInt, Role.TOPOLOGY] = 1
    gradient_checkpointing: Annotated[bool, Role.TOPOLOGY] = False
    mixed_precision: Annotated[Literal["no", "bf16"], Role.TOPOLOGY] = "no"
    learning_rate: PositiveFloat
    warmup: NonNegativeFloat = 0
    lr_scheduler_type: Literal[tuple(SCHEDULES)] = "linear"
    lr_scheduler_kwargs: dict[str, float] = Field(default_factory=dict)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("set exactly one of max_steps, num_train_epochs")
        return self

    @model_validator(mode="after")
    def _schedule(self) -> "TrainingConfig":
        name, known = self.lr_scheduler_type, SCHEDULES[self.lr_scheduler_type]
        unknown = sorted(set(self.lr_scheduler_kwargs) - set(known))
        if unknown:
            raise ValueError(
                f"lr_scheduler_kwargs: {name} takes {', '.join(known) or 'none'} "
                f"(got {', '.join(unknown)})"
            )
        if name == "cosine_with_min_lr" and "min_lr_rate" not in self.lr_scheduler_kwargs:
            raise ValueError("lr_scheduler_kwargs: cosine_with_min_lr needs min_lr_rate")
        if name == "constant" and self.warmup:
            raise ValueError("lr_scheduler_type: constant has no warmup; use constant_with_warmup")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: must be whole steps, or a share < 1 (got {self.warmup})")
        return self

    @model_validator(mode="after")
    def _batches(self) -> "TrainingConfig":
        accumulation_steps(self, 1)
        return self

    def num_steps(self, num_rows: int) -> int:
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None
        return ceil(self.num_train_epochs * num_rows / self.effective_batch_size)

    def num_warmup_steps(self, num_steps: int) -> int:
        return int(self.warmup) if self.warmup >= 1 else ceil(self.warmup * num_steps)


class CheckpointingConfig(Config):
    """A checkpoint is written every `save_steps` and at the end; the newest are kept."""

    save_steps: Annotated[PositiveInt, Role.PLACEMENT] = 500
    save_total_limit: Annotated[PositiveInt | None, Role.PLACEMENT] = 2


class LoggingConfig(Config):
    logging_steps: Annotated[PositiveInt, Role.PLACEMENT] = 10


class TrainingStageConfig(StageConfig):
    model: ModelConfig
    training: TrainingConfig
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _batches_of_processes(self) -> "TrainingStageConfig":
        accumulation_steps(self.training, self.num_processes or 1)
        return self


def accumulation_steps(training: TrainingConfig, num_processes: int) -> int:
    """Micro-batches each process accumulates for one step.

    Errors: ValueError when the processes can't share the batch evenly.
    """
    micro = training.per_device_train_batch_size
    unit = micro * num_processes
    effective = training.effective_batch_size
    if effective % unit == 0:
        return effective // unit
    below = effective // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    raise ValueError(
        f"effective_batch_size must be a multiple of per_device_train_batch_size × processes "
        f"= {micro} × {num_processes} (got {effective}; nearest: {nearest})"
    )
