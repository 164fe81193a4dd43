"""Settings that every training stage has."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from post_training.config.model import Config, Role
from post_training.core.errors import UsageError
from post_training.stages.config import StageConfig
from post_training.stages.training.named_settings import complete
from post_training.stages.training.optimizer_settings import OPTIMIZERS, known_optimizer
from post_training.stages.training.schedules import (
    SCHEDULES,
    check_minimum,
    check_steps_or_share,
    decimal,
)

DURATIONS = ("max_steps", "num_train_epochs", "num_training_samples", "num_training_tokens")
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


class ModelConfig(Config):
    """path: a model folder, as transformers saves it.

    dtype: of the weights. In bfloat16 the optimizer's averages are bfloat16 too, and one with a
    decay of 0.999 then stands still: float32 with training.mixed_precision: bf16 is safer. The
    ZeRO strategies keep float32 copies, whatever this says.
    """

    path: Annotated[Path, Role.INPUT]
    attn_implementation: Annotated[Attention, Role.TOPOLOGY] = "sdpa"
    dtype: Annotated[Literal["float32", "bfloat16"], Role.TOPOLOGY] = "float32"


class LoraConfig(Config):
    """Train a low-rank addition to some matrices, W + (alpha / rank) B A, and nothing else
    (https://arxiv.org/abs/2106.09685). RUN/adapter has it alone, RUN/model the sum.

    target_modules: names of linear layers, as in config.json's architecture (q_proj, down_proj);
    by default all of them but the output layer, which can't be one.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | None = Field(default=None, min_length=1)


class TrainingConfig(Config):
    """The length of the run is exactly one of max_steps, num_train_epochs, num_training_samples
    (sequences, as they are before packing) and num_training_tokens (of packed rows). The last two
    count with the means of the prepared rows: n tokens are n / (tokens of all rows) epochs.

    effective_batch_size: rows in a step, over all processes and accumulation steps.
    shuffle: the rows of each epoch in an order of its own; else always in the dataset's.
    mixed_precision: dtype of the matrix products, whatever the weights'. warmup: steps if ≥ 1, else
    a share of all steps. lr_scheduler_kwargs, optimizer_args: see schedules.py and
    optimizer_settings.py. weight_decay: of matrices; not of norms and biases. max_grad_norm: 0
    turns clipping off. use_liger_kernel: norms, rotary embeddings and MLPs as fused GPU kernels;
    the loss has its own. padding_free: a micro-batch is a single row of all its sequences.
    """

    max_steps: PositiveInt | None = None
    num_train_epochs: PositiveFloat | None = None
    num_training_samples: PositiveInt | None = None
    num_training_tokens: PositiveInt | None = None
    effective_batch_size: PositiveInt
    shuffle: bool = True
    per_device_train_batch_size: Annotated[PositiveInt, Role.TOPOLOGY] = 1
    padding_free: Annotated[bool, Role.TOPOLOGY] = False
    gradient_checkpointing: Annotated[bool, Role.TOPOLOGY] = False
    mixed_precision: Annotated[Literal["no", "bf16"], Role.TOPOLOGY] = "no"
    torch_compile: Annotated[bool, Role.TOPOLOGY] = False
    use_liger_kernel: Annotated[bool, Role.TOPOLOGY] = False
    learning_rate: PositiveFloat
    warmup: NonNegativeFloat = 0
    lr_scheduler_type: Literal[tuple(SCHEDULES)] = "linear"
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    optimizer: Annotated[Literal[tuple(OPTIMIZERS)], BeforeValidator(known_optimizer)] = "adamw"
    optimizer_args: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0

    @field_validator("lr_scheduler_kwargs", "optimizer_args")
    @classmethod
    def _complete(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        of_schedule = info.field_name == "lr_scheduler_kwargs"
        name = info.data.get("lr_scheduler_type" if of_schedule else "optimizer")
        if name is None:  # it is wrong itself, and that is said
            return given
        return complete(name, (SCHEDULES if of_schedule else OPTIMIZERS)[name], given)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"set exactly one of {', '.join(DURATIONS)} (got {got})")
        return self

    @model_validator(mode="after")
    def _schedule(self) -> "TrainingConfig":
        check_steps_or_share("warmup", self.warmup)
        if "num_decay_steps" in self.lr_scheduler_kwargs:
            decay = self.lr_scheduler_kwargs["num_decay_steps"]
            check_steps_or_share("lr_scheduler_kwargs.num_decay_steps", decay)
        check_minimum(self.lr_scheduler_kwargs, self.learning_rate)
        if self.lr_scheduler_type == "constant" and self.warmup:
            raise ValueError("lr_scheduler_type: constant has no warmup; use constant_with_warmup")
        return self

    def num_steps(self, counts: Mapping[str, int]) -> int:
        """Optimizer steps over a dataset with these num_rows, num_sequences and num_tokens.

        A part of a batch at the end is a step too; all steps have whole batches.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.num_train_epochs is not None:
            num_epochs = decimal(self.num_train_epochs)
        elif self.num_training_samples is not None:
            num_epochs = Fraction(self.num_training_samples, counts["num_sequences"])
        else:
            num_epochs = Fraction(self.num_training_tokens, counts["num_tokens"])
        return ceil(num_epochs * counts["num_rows"] / self.effective_batch_size)


class DistributedConfig(Config):
    """How training is divided among the processes. Each always has rows of its own.

    strategy: ddp: every process has the whole model. zero1, zero2, zero3 (DeepSpeed): the
    optimizer's state is divided; the gradients too; the weights too. fsdp2 (torch): all three.
    offload: what lies in the memory of the CPU: the optimizer's state, or also the weights.
    """

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    offload: Literal["none", "optimizer", "parameters"] = "none"

    @property
    def is_zero(self) -> bool:
        return self.strategy.startswith("zero")

    @model_validator(mode="after")
    def _offload_of_what_is_divided(self) -> "DistributedConfig":
        possible = {
            "ddp": ("none",),
            "zero1": ("none", "optimizer"),
            "zero2": ("none", "optimizer"),
            "zero3": ("none", "optimizer", "parameters"),
            "fsdp2": ("none", "parameters"),  # torch moves the optimizer's state along with them
        }[self.strategy]
        if self.offload not in possible:
            raise ValueError(
                f"offload: {self.strategy} can have {' or '.join(possible)} (got {self.offload})"
            )
        return self


class CheckpointingConfig(Config):
    """A checkpoint, to go on from, is written every `save_steps` and at the end; the newest are
    kept. inference_checkpoint_steps: a model folder for plain transformers is written so often too,
    into RUN/inference_checkpoints/step-N; null or ≤ 0: never. inference_checkpoint_path: a folder
    for them elsewhere, of this run alone, to which RUN/inference_checkpoints is then a link."""

    save_steps: Annotated[PositiveInt, Role.PLACEMENT] = 500
    save_total_limit: Annotated[PositiveInt | None, Role.PLACEMENT] = 2
    inference_checkpoint_steps: Annotated[int | None, Role.PLACEMENT] = None
    inference_checkpoint_path: Annotated[Path | None, Role.PLACEMENT] = None


class LoggingConfig(Config):
    """logging_steps: steps of a line in metrics.jsonl. report_to: who else gets the lines, in
    RUN/tensorboard and RUN/wandb. wandb_run_name: the run folder's name if there is none.

    W&B is online with a key, from the file that WANDB_API_KEY_FILE names or in WANDB_API_KEY, and
    else offline; WANDB_MODE overrides that.
    """

    logging_steps: Annotated[PositiveInt, Role.PLACEMENT] = 10
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], Role.PLACEMENT] = Field(
        default_factory=list
    )
    wandb_project: Annotated[str, Role.PLACEMENT] = "post-training"
    wandb_run_name: Annotated[str | None, Role.PLACEMENT] = None
    wandb_group: Annotated[str | None, Role.PLACEMENT] = None
    wandb_tags: Annotated[list[str], Role.PLACEMENT] = Field(default_factory=list)


class TrainingStageConfig(StageConfig):
    version: ClassVar[int] = 2
    continues: ClassVar[bool] = True

    model: ModelConfig
    lora: LoraConfig | None = None
    training: TrainingConfig
    distributed: Annotated[DistributedConfig, Role.TOPOLOGY] = DistributedConfig()
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def rows_are_packed(self) -> bool:
        """Whether a row holds several sequences."""
        return False

    @model_validator(mode="after")
    def _tokens_of_packed_rows(self) -> "TrainingStageConfig":
        if self.training.num_training_tokens is not None and not self.rows_are_packed:
            raise ValueError(
                "training.num_training_tokens: needs packed rows (set packing, or give "
                "num_training_samples)"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> "TrainingStageConfig":
        optimizer, divided = self.training.optimizer, self.distributed
        if optimizer == "adafactor" and divided.is_zero:
            raise ValueError(
                "training.optimizer: adafactor works on whole matrices, and ZeRO gives it pieces"
            )
        if optimizer == "ademamix" and self.model.dtype == "bfloat16" and not divided.is_zero:
            raise ValueError(
                "model.dtype: ademamix's slow average can't be kept in bfloat16, which rounds its "
                "steps away (use float32 with training.mixed_precision: bf16)"
            )
        return self

    @model_validator(mode="after")
    def _precision_under_zero(self) -> "TrainingStageConfig":
        in_16_bits = self.training.mixed_precision == "bf16"
        if self.distributed.is_zero and self.model.dtype == "bfloat16" and not in_16_bits:
            raise ValueError(
                "model.dtype: ZeRO with weights in bfloat16 needs training.mixed_precision: bf16"
            )
        return self

    def check_ranks(self, world_size: int) -> None:
        accumulation_steps(self.training, world_size)


def accumulation_steps(training: TrainingConfig, num_processes: int) -> int:
    """Micro-batches each process accumulates for one step.

    Errors: UsageError when the processes can't share the batch evenly.
    """
    micro = training.per_device_train_batch_size
    unit = micro * num_processes
    effective = training.effective_batch_size
    if effective % unit == 0:
        return effective // unit
    below = effective // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    raise UsageError(
        f"effective_batch_size must be a multiple of per_device_train_batch_size × processes "
        f"= {micro} × {num_processes} (got {effective}; nearest: {nearest})",
        where="training",
    )
