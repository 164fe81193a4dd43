"""The blocks that the configuration of every training stage has: `lora`, `training`,
`distributed`, `checkpointing` and `logging`. The optimizers and schedules are in optim.py.
"""

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from post_training.config.faults import explain
from post_training.config.model import ADDED_LATER, Config, Role, not_default
from post_training.core import yaml
from post_training.core.errors import UsageError
from post_training.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    check_minimum,
    check_steps_or_share,
    decimal,
    normalize_optimizer_name,
)

DURATIONS = ("max_steps", "num_train_epochs", "num_training_samples", "num_training_tokens")


class LoraConfig(Config):
    """Train a low-rank addition to some matrices and nothing else (arXiv 2106.09685)."""

    rank: PositiveInt = Field(16, description="Rank of the addition B A.")
    alpha: PositiveFloat = Field(
        32.0, description="The addition is multiplied by alpha / rank, as W + (alpha / rank) B A."
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability that an input of the addition is set to 0 in training.",
    )
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of linear layers as the model's architecture calls them (q_proj, "
        "down_proj). By default all but the output layer, which can't be one.",
    )


class TrainingConfig(Config):
    """The length of the run, its batches, its numerics and its optimizer."""

    max_steps: PositiveInt | None = Field(
        None,
        description="Length of the run in optimizer steps. Set exactly one of "
        f"{', '.join(DURATIONS)}.",
    )
    num_train_epochs: PositiveFloat | None = Field(
        None,
        description="Length of the run in passes over the rows, such as 1.5. A part of a batch at "
        "the end is a step with a whole batch.",
    )
    num_training_samples: PositiveInt | None = Field(
        None,
        description="Length of the run in sequences as they are before packing. It becomes epochs: "
        "n sequences are n / (all sequences) of them.",
    )
    num_training_tokens: PositiveInt | None = Field(
        None,
        description="Length of the run in tokens of packed rows; needs packing. It becomes epochs: "
        "n tokens are n / (tokens of all rows) of them.",
    )
    iteration_offset: Annotated[NonNegativeInt, ADDED_LATER] = Field(
        0,
        description="Steps of an earlier training that this one is numbered on from: n makes the "
        "first step n + 1, in figures, names of checkpoints and the schedule, which is as long as "
        "both. Weights come from model.path; the optimizer and the order of the rows begin anew.",
    )
    effective_batch_size: PositiveInt = Field(
        description="Rows in an optimizer step, over all processes and accumulation steps. A "
        "multiple of per_device_train_batch_size × processes, so that each has as many."
    )
    shuffle: bool = Field(
        True,
        description="Each epoch has the rows in a random order of its own. false: always in the "
        "dataset's order.",
    )
    per_device_train_batch_size: Annotated[PositiveInt, Role.TOPOLOGY] = Field(
        1, description="Rows in a micro-batch of one process."
    )
    padding_free: Annotated[bool, Role.TOPOLOGY] = Field(
        False,
        description="A micro-batch is a single row of all its sequences, without padding. Each "
        "still sees only itself.",
    )
    pad_to_multiple_of: Annotated[PositiveInt | None, Role.TOPOLOGY, ADDED_LATER] = Field(
        None,
        description="Pad each micro-batch to a multiple of this number of tokens. With the maximal "
        "length of a row, all micro-batches have one shape. By default it is padded to its longest "
        "row.",
    )
    exit_interval: Annotated[PositiveInt | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        description="Stop at each multiple of this number of steps, with a checkpoint, as on "
        "SIGUSR1: the same command goes on, and a submitted job is requeued. By default the run "
        "stops only at its end.",
    )
    gradient_checkpointing: Annotated[bool, Role.TOPOLOGY] = Field(
        False,
        description="Compute the inside of the layers again in the backward pass instead of "
        "keeping it: less memory, more time.",
    )
    mixed_precision: Annotated[Literal["no", "bf16"], Role.TOPOLOGY] = Field(
        "no",
        description="dtype of the matrix products, whatever the weights': bf16, or no: that of the "
        "weights.",
    )
    torch_compile: Annotated[bool, Role.TOPOLOGY] = Field(
        False, description="Compile the model with torch.compile: a slower start, faster steps."
    )
    use_liger_kernel: Annotated[bool, Role.TOPOLOGY] = Field(
        False,
        description="Norms, rotary embeddings and MLPs as fused GPU kernels of Liger. The loss has "
        "its own.",
    )
    learning_rate: PositiveFloat = Field(
        description="Learning rate after warmup; the schedule goes down from it."
    )
    warmup: NonNegativeFloat = Field(
        0, description="Length of the warmup: steps if ≥ 1, else a share of all steps."
    )
    lr_scheduler_type: Literal[tuple(SCHEDULES)] = Field(
        "linear", description="Schedule of the learning rate, by transformers' name."
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        validate_default=True,
        description="Settings of the schedule; which ones there are depends on lr_scheduler_type.",
    )
    optimizer: Annotated[Literal[tuple(OPTIMIZERS)], BeforeValidator(normalize_optimizer_name)] = (
        Field("adamw", description="The optimizer. adamw is torch's fused AdamW.")
    )
    optimizer_args: dict[str, Any] = Field(
        default_factory=dict,
        validate_default=True,
        description="Settings of the optimizer; which ones there are depends on its name.",
    )
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Weight decay of matrices. Norms and biases have none."
    )
    max_grad_norm: NonNegativeFloat = Field(
        1.0,
        description="The gradient is scaled down to this norm where it is longer. 0: no clipping.",
    )

    @field_validator("lr_scheduler_kwargs", "optimizer_args")
    @classmethod
    def _complete(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        of_schedule = info.field_name == "lr_scheduler_kwargs"
        name = info.data.get("lr_scheduler_type" if of_schedule else "optimizer")
        if name is None:  # it is wrong itself, and that is said
            return given
        return _with_defaults(name, (SCHEDULES if of_schedule else OPTIMIZERS)[name], given)

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


def _with_defaults(name: str, model: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the defaults of `model`, so that the recipe says each value that counts.

    name: of the optimizer or schedule, for messages.
    Errors: ValueError, one line with every fault.
    """
    known = list(model.model_fields)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} takes {', '.join(known) or 'none'} (got {', '.join(unknown)})")
    try:
        settings = model.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        faults = explain(model, error, given, lambda path: "")
        raise ValueError(f"{name}: {'; '.join(faults)}") from None
    return settings.model_dump(mode="json", exclude_none=True)


def accumulation_steps(training: TrainingConfig, num_processes: int) -> int:
    """Micro-batches each process accumulates for one step.

    num_processes: that have rows of their own.
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


class DistributedConfig(Config):
    """How training is divided among the processes. Each has rows of its own, or shares them with
    its neighbours (context_parallel_size)."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "ddp",
        description="What is divided. ddp: nothing, every process has the whole model; zero1 "
        "(DeepSpeed): the optimizer's state; zero2: the gradients too; zero3: the weights too; "
        "fsdp2 (torch): all three.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What is in the CPU's memory instead of the GPU's: the optimizer's state "
        "(zero1 to zero3), or the weights too (zero3 and fsdp2).",
    )
    context_parallel_size: Annotated[PositiveInt, ADDED_LATER] = Field(
        1,
        description="Number of processes that share each row, in sft, for long rows: each has a "
        "part of the tokens. It must divide the number of processes and the number of the model's "
        "attention heads, and it needs model.attn_implementation: varlen.",
    )

    deepspeed_config: Annotated[dict[str, Any] | None, ADDED_LATER] = Field(
        None,
        description="Settings of DeepSpeed itself, as a mapping or the path of a .json or .yaml "
        "file. They override those that follow from the strategy. A value that contradicts another "
        "setting is refused; auto is accepted. The file's content is recorded.",
    )

    @property
    def is_zero(self) -> bool:
        return self.strategy.startswith("zero")

    @field_validator("deepspeed_config", mode="before")
    @classmethod
    def _content(cls, given: Any) -> Any:
        # Here, so that what counts and is recorded is the content, wherever the file is.
        return _read_mapping(Path(given)) if isinstance(given, str | Path) else given

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


def _read_mapping(path: Path) -> dict[str, Any]:
    """Errors: ValueError for what is no file with a mapping."""
    try:
        text = path.read_bytes()
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, str(path)).data
    except (OSError, ValueError, UsageError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping (got {type(content).__name__})")
    return content


def conflicts_with_settings(
    training: TrainingConfig, distributed: DistributedConfig
) -> Iterator[str]:
    """What `deepspeed_config` says that other settings say otherwise, a line each."""
    given, offload = distributed.deepspeed_config or {}, distributed.offload
    if wrong := _no_mappings(given):
        yield f"{wrong[0]} must be a mapping"
        return
    zero, optimizer = (given.get(name) or {} for name in ("zero_optimization", "optimizer"))
    devices = {
        "offload_optimizer": "none" if offload == "none" else "cpu",
        "offload_param": "cpu" if offload == "parameters" else "none",
    }
    divided = distributed.strategy.startswith("zero")
    said = {
        "zero_optimization.stage": (
            zero.get("stage"),
            int(distributed.strategy[-1]) if divided else 0,
        ),
        **{
            f"zero_optimization.{name}.device": ((zero.get(name) or {}).get("device"), device)
            for name, device in devices.items()
        },
        "gradient_clipping": (given.get("gradient_clipping"), training.max_grad_norm),
        "train_micro_batch_size_per_gpu": (
            given.get("train_micro_batch_size_per_gpu"),
            training.per_device_train_batch_size,
        ),
        "train_batch_size": (given.get("train_batch_size"), training.effective_batch_size),
        "gradient_accumulation_steps": (given.get("gradient_accumulation_steps"), "auto"),
        "bf16.enabled": (
            (given.get("bf16") or {}).get("enabled"),
            training.mixed_precision == "bf16",
        ),
        "fp16.enabled": ((given.get("fp16") or {}).get("enabled"), False),
    }
    for key, (theirs, ours) in said.items():
        if theirs not in (None, "auto", ours):
            yield f"{key} is {theirs!r}, and by the other settings it is {ours!r}"
    values = (optimizer.get("params") or {}).values()
    if given.get("scheduler") is not None or any(value != "auto" for value in values):
        yield "optimizer and scheduler are named in training: leave them out, or each value auto"
    kind, ours = optimizer.get("type", "auto"), training.optimizer
    if str(kind).lower() not in ("auto", ours, *(_ADAMW if ours in _ADAMW else ())):
        yield f"optimizer.type is {kind!r}, and training.optimizer is {ours!r}"


# DeepSpeed's Adam is AdamW too, unless optimizer.params say otherwise, which are refused.
_ADAMW = ("adam", "adamw", "adamw_torch")


def _no_mappings(given: Mapping[str, Any]) -> list[str]:
    """Keys whose settings are looked at, and which have none."""
    found = {name: given.get(name) for name in ("zero_optimization", "optimizer", "bf16", "fp16")}
    for part, name in (
        ("zero_optimization", "offload_optimizer"),
        ("zero_optimization", "offload_param"),
        ("optimizer", "params"),
    ):
        if isinstance(found[part], Mapping):
            found[f"{part}.{name}"] = found[part].get(name)
    return [name for name, value in found.items() if not isinstance(value, Mapping | None)]


# What DeepSpeed would take for its own to decide.
_OF_OTHER_SETTINGS = ("optimizer", "scheduler", "train_batch_size")


def merge_deepspeed(ours: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `ours`; what is auto or null there is ours."""
    merged = dict(ours)
    for key, value in given.items():
        if key in _OF_OTHER_SETTINGS or value in (None, "auto"):
            continue
        if isinstance(value, dict):
            own = merged.get(key)
            merged[key] = merge_deepspeed(own if isinstance(own, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def steps_per_epoch(per_epoch: int, num_rows: int, effective_batch_size: int) -> int:
    """Steps between two of `per_epoch` events in a pass over the rows, at least 1."""
    return max(1, ceil(Fraction(num_rows, effective_batch_size * per_epoch)))


class CheckpointingConfig(Config):
    """What is written along the way: checkpoints to resume from, and models for inference."""

    save_steps: Annotated[PositiveInt, Role.PLACEMENT] = Field(
        500, description="Steps between two checkpoints; there is always one at the end."
    )
    saves_per_epoch: Annotated[PositiveInt | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        description="Instead of save_steps: number of checkpoints in each epoch.",
    )
    save_total_limit: Annotated[PositiveInt | None, Role.PLACEMENT] = Field(
        2, description="How many checkpoints are kept, the newest. null: all."
    )
    inference_checkpoint_steps: Annotated[int | None, Role.PLACEMENT] = Field(
        None,
        description="Steps between two model folders for plain transformers, in "
        "RUN/inference_checkpoints/step-N. null or ≤ 0: none.",
    )
    inference_checkpoint_path: Annotated[Path | None, Role.PLACEMENT] = Field(
        None,
        description="Another folder for these models, of this run alone; "
        "RUN/inference_checkpoints is then a link to it.",
    )

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "CheckpointingConfig":
        if self.saves_per_epoch is not None and not_default(self, ["save_steps"]):
            raise ValueError("set either save_steps or saves_per_epoch")
        return self


class LoggingConfig(Config):
    """Where the metrics go."""

    logging_steps: Annotated[PositiveInt, Role.PLACEMENT] = Field(
        10, description="Steps that one line of metrics.jsonl is about."
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], Role.PLACEMENT] = Field(
        default_factory=list,
        description="Who else gets the lines, in RUN/tensorboard and RUN/wandb. W&B is online with "
        "a key, from the file that WANDB_API_KEY_FILE names or in WANDB_API_KEY, and else offline; "
        "WANDB_MODE overrides that.",
    )
    wandb_project: Annotated[str, Role.PLACEMENT] = Field(
        "post-training", description="Project of the run at W&B."
    )
    wandb_run_name: Annotated[str | None, Role.PLACEMENT] = Field(
        None, description="Name of the run at W&B. By default the run folder's name."
    )
    wandb_group: Annotated[str | None, Role.PLACEMENT] = Field(
        None, description="Group of the run at W&B. By default none."
    )
    wandb_entity: Annotated[str | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None, description="User or team of the run at W&B. By default that of the key."
    )
    wandb_dir: Annotated[Path | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None, description="Folder for W&B's files, as its WANDB_DIR. By default RUN/wandb."
    )
    wandb_tags: Annotated[list[str], Role.PLACEMENT] = Field(
        default_factory=list, description="Tags of the run at W&B."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _nobody(cls, given: Any) -> Any:
        # transformers' word for it.
        return [] if given in ("none", ["none"]) else given
