"""Settings that every training stage has."""

import json
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
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from post_training.config.faults import explain
from post_training.config.model import Config, Role, not_default
from post_training.core.errors import UsageError
from post_training.data.config import DataConfig, DatasetConfig, PairConfig, SequenceConfig
from post_training.models.config import ModelConfig
from post_training.stages.config import StageConfig
from post_training.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    check_minimum,
    check_steps_or_share,
    decimal,
    known_optimizer,
)

# Settings that depend on a name beside them: `optimizer_args` of `optimizer`, and the like.


def complete(name: str, model: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the defaults of `model`, so that the recipe says each value that counts.

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


# Settings that every training stage has.


DURATIONS = ("max_steps", "num_train_epochs", "num_training_samples", "num_training_tokens")


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


# Settings of the stages that evaluate while they train: sft and dpo.


class EvaluationConfig(Config):
    """datasets: read as data.datasets are, and never packed; or prepared, so made.
    debug_subsample: use only the first rows of each dataset.
    eval_steps: steps between two evaluations; there is always one at the end."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    prepared: Annotated[Path | None, Role.INPUT] = None
    debug_subsample: PositiveInt | None = None
    eval_steps: Annotated[PositiveInt | None, Role.PLACEMENT] = None
    per_device_eval_batch_size: Annotated[PositiveInt, Role.TOPOLOGY] = 8

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "EvaluationConfig":
        if bool(self.datasets) == (self.prepared is not None):
            raise ValueError("set exactly one of datasets, prepared")
        return self


class EvaluatedStageConfig(TrainingStageConfig):
    data: DataConfig
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def _template_for_evaluation(self) -> "EvaluatedStageConfig":
        evaluation = self.evaluation
        if evaluation and evaluation.datasets and not self.data.datasets:
            raise ValueError(
                "evaluation.datasets are rendered with data.chat_template, which goes with "
                "data.datasets; give evaluation.prepared instead"
            )
        return self

    def evaluation_data(self) -> DataConfig:
        """The settings of `data` for the evaluation's rows."""
        assert self.evaluation is not None
        if self.evaluation.prepared is not None:
            return DataConfig(prepared=self.evaluation.prepared)
        changed = {
            "datasets": self.evaluation.datasets,
            "debug_oom": False,
            "debug_subsample": self.evaluation.debug_subsample,
        }
        return self.data.model_copy(update=changed)


# The configuration of `entrypoint sft`.


_OF_IRL = ("irl_gamma", "irl_lambda")


class SftLossConfig(Config):
    """name: one of losses.py. prompt_loss_weight: of plw, ln-plw and irl; 0 leaves the prompt out.
    sequence_level_loss: normalise within each sequence, then average over the sequences of the
    global batch, instead of over all its tokens. irl_lambda, irl_gamma: weight of the temporal
    difference and discount."""

    name: Literal["sft", "plw", "ln-plw", "irl"] = "plw"
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1)
    sequence_level_loss: bool = False
    irl_lambda: NonNegativeFloat = 0.5
    irl_gamma: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _only_what_counts(self) -> "SftLossConfig":
        if self.name != "irl" and (of_irl := not_default(self, _OF_IRL)):
            raise ValueError(f"{of_irl[0]} is a setting of irl (name is {self.name})")
        if self.name == "sft" and not_default(self, ["prompt_loss_weight"]):
            raise ValueError("sft has no prompt_loss_weight: it trains on all tokens; use plw")
        return self


class SftConfig(EvaluatedStageConfig):
    version: ClassVar[int] = 2

    sft: SequenceConfig
    loss: SftLossConfig = SftLossConfig()

    @property
    def rows_are_packed(self) -> bool:
        return self.sft.packing != "none"


# The configuration of `entrypoint dpo`.


OF_QRPO = ("normalize_loss_by_length", "quantile_transform")


class PreferenceLossConfig(Config):
    """name: one of losses.py. beta: how much it costs to leave the reference.

    normalize_beta_by_length: each answer's beta is divided by its number of tokens; dpo-norm is dpo
    with it. label_smoothing: the share of pairs that are taken to be labelled the wrong way round.
    quantile_transform, normalize_loss_by_length: of qrpo: f, and whether the squared error of an
    answer is divided by its number of tokens.
    """

    name: Literal["dpo", "dpo-norm", "ipo", "hinge", "qrpo"] = "dpo"
    beta: PositiveFloat
    normalize_beta_by_length: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    quantile_transform: Literal["identity", "log", "square", "sqrt", "normal"] = "identity"
    normalize_loss_by_length: bool = False

    @property
    def beta_is_per_length(self) -> bool:
        return self.normalize_beta_by_length or self.name == "dpo-norm"

    @model_validator(mode="after")
    def _only_what_counts(self) -> "PreferenceLossConfig":
        if self.name != "qrpo" and (of_qrpo := not_default(self, OF_QRPO)):
            raise ValueError(f"{of_qrpo[0]} is a setting of qrpo (name is {self.name})")
        if self.label_smoothing and self.name not in ("dpo", "dpo-norm"):
            raise ValueError(f"label_smoothing is a setting of dpo (name is {self.name})")
        return self


class ReferenceConfig(Config):
    """Where the reference's logprobs come from; its weights are never in memory with the policy's.

    logprobs: `stored` in the dataset (ref_chosen_logprob, ref_rejected_logprob); `computed` in a
    pass before training; `auto`: stored where every pair has them, and computed where none has.
    ref_model_name_or_path: a model folder to compute them with; by default model.path.
    tolerance: by how many nats a token a stored logprob may differ from what the untouched model
    gives in the first step; default: 0.001, and 0.03 where the model computes in 16 bits.
    """

    logprobs: Literal["auto", "stored", "computed"] = "auto"
    ref_model_name_or_path: Annotated[Path | None, Role.INPUT] = None
    tolerance: Annotated[NonNegativeFloat | None, Role.PLACEMENT] = None

    @model_validator(mode="after")
    def _a_model_computes(self) -> "ReferenceConfig":
        if self.ref_model_name_or_path is not None and self.logprobs == "stored":
            raise ValueError("ref_model_name_or_path: only where logprobs are computed")
        return self


class DpoConfig(EvaluatedStageConfig):
    version: ClassVar[int] = 2

    dpo: PairConfig
    loss: PreferenceLossConfig
    reference: ReferenceConfig = ReferenceConfig()

    @property
    def rows_are_packed(self) -> bool:
        return self.dpo.packing != "none"

    @model_validator(mode="after")
    def _pairs(self) -> "DpoConfig":
        if self.data.indexed:
            raise ValueError("data: set datasets or prepared; indexed documents have no pairs")
        return self

    @model_validator(mode="after")
    def _mask_of_a_shared_prompt(self) -> "DpoConfig":
        if self.dpo.share_prompt and self.model.attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "dpo.share_prompt: its mask needs model.attn_implementation: sdpa or eager"
            )
        return self


# The configuration of `entrypoint reward-model`.


_OF_A_POLICY = ("packing", "max_seq_length", "share_prompt", "num_ref_rewards")


class RewardModelConfig(TrainingStageConfig):
    """data: preference rows. model: a language model, which gets a new output, or a reward model.
    pairs: what is too long; by default a pair that would be cut is left out.
    center_rewards_coefficient: of losses.py; 0: rewards have no fixed zero.
    """

    data: DataConfig
    pairs: PairConfig = PairConfig()
    center_rewards_coefficient: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _pairs_alone(self) -> "RewardModelConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        defaults = PairConfig()
        for key in _OF_A_POLICY:
            if getattr(self.pairs, key) != getattr(defaults, key):
                raise ValueError(f"pairs.{key}: is for training a policy")
        if self.lora is not None:
            raise ValueError("lora: a reward model is trained whole")
        if self.training.padding_free:
            raise ValueError("training.padding_free: a reward model has one conversation a row")
        if self.distributed.strategy in ("zero3", "fsdp2"):
            raise ValueError("distributed.strategy: a reward model's new output is not divided yet")
        return self
