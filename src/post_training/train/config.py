"""The configurations of the training stages: `entrypoint sft`, `dpo` and `reward-model`.

The blocks that all of them have are in training_config.py.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from post_training.config.model import ADDED_LATER, Config, Role, not_default
from post_training.core.errors import UsageError
from post_training.data.config import DataConfig, DatasetConfig, PairConfig, SequenceConfig
from post_training.models.config import TrainedModelConfig, check_float32_logits
from post_training.stages.config import StageConfig
from post_training.train.training_config import (
    CheckpointingConfig,
    DistributedConfig,
    LoggingConfig,
    LoraConfig,
    TrainingConfig,
    accumulation_steps,
    conflicts_with_settings,
    steps_per_epoch,
)

_OF_IRL = ("irl_gamma", "irl_lambda")
_OF_QRPO = ("normalize_loss_by_length", "quantile_transform")
_OF_A_POLICY = ("packing", "max_seq_length", "share_prompt", "num_ref_rewards")


class TrainingStageConfig(StageConfig):
    """What every training stage has."""

    version: ClassVar[int] = 2
    continues: ClassVar[bool] = True
    can_share_rows: ClassVar[bool] = False  # several processes have parts of a row

    model: TrainedModelConfig = Field(description="The model to train.")
    lora: LoraConfig | None = Field(
        None,
        description="Train a low-rank addition (LoRA): RUN/adapter has it alone, RUN/model the "
        "sum. By default the whole model is trained.",
    )
    training: TrainingConfig = Field(
        description="The length of the run, its batches, its numerics and its optimizer."
    )
    distributed: Annotated[DistributedConfig, Role.TOPOLOGY] = Field(
        DistributedConfig(), description="How training is divided among the processes."
    )
    checkpointing: CheckpointingConfig = Field(
        CheckpointingConfig(), description="Checkpoints, and models for inference along the way."
    )
    logging: LoggingConfig = Field(LoggingConfig(), description="Where the metrics go.")

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

    @property
    def computes_in_16_bits(self) -> bool:
        """Whether the matrix products are of bfloat16."""
        return self.model.dtype == "bfloat16" or self.training.mixed_precision == "bf16"

    @model_validator(mode="after")
    def _float32_logits_differ(self) -> "TrainingStageConfig":
        check_float32_logits(self.model, computes_in_16_bits=self.computes_in_16_bits)
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

    @model_validator(mode="after")
    def _deepspeed_as_the_settings_say(self) -> "TrainingStageConfig":
        if self.distributed.deepspeed_config is None:
            return self
        if not self.distributed.is_zero:
            raise ValueError(
                "distributed.deepspeed_config: needs strategy: zero1, zero2 or zero3 "
                f"(got {self.distributed.strategy})"
            )
        if conflicts := list(conflicts_with_settings(self.training, self.distributed)):
            raise ValueError(f"distributed.deepspeed_config: {'; '.join(conflicts)}")
        return self

    def check_ranks(self, world_size: int) -> None:
        size = self.distributed.context_parallel_size
        if world_size % size:
            raise UsageError(
                f"context_parallel_size must divide the number of processes, {world_size} "
                f"(got {size})",
                where="distributed",
            )
        accumulation_steps(self.training, world_size // size)

    @model_validator(mode="after")
    def _rows_that_are_shared(self) -> "TrainingStageConfig":
        if self.distributed.context_parallel_size == 1:
            return self
        attention, problem = self.model.attn_implementation, None
        if not self.can_share_rows:
            problem = "sft alone has it: here a sequence's log-probability or reward is of all its "
            problem += "tokens at once"
        elif attention != "varlen":
            problem = f"needs model.attn_implementation: varlen (got {attention})"
        elif self.training.torch_compile:
            problem = "not with training.torch_compile: the exchange between processes was never "
            problem += "compiled"
        if problem is not None:
            raise ValueError(f"distributed.context_parallel_size: {problem}")
        return self

    def in_steps(self, num_rows: int) -> Self:
        """With save_steps in place of saves_per_epoch. num_rows: of the data."""
        if self.checkpointing.saves_per_epoch is None:
            return self
        steps = steps_per_epoch(
            self.checkpointing.saves_per_epoch, num_rows, self.training.effective_batch_size
        )
        checkpointing = self.checkpointing.model_copy(update={"save_steps": steps})
        return self.model_copy(update={"checkpointing": checkpointing})


class EvaluationConfig(Config):
    """Rows to evaluate on while training."""

    datasets: list[DatasetConfig] = Field(
        default_factory=list,
        description="Read as data.datasets are, with their template, and never packed. Set either "
        "datasets or prepared.",
    )
    prepared: Annotated[Path | None, Role.INPUT] = Field(
        None, description="Instead of datasets: one that `entrypoint prepare` wrote."
    )
    debug_subsample: PositiveInt | None = Field(
        None, description="For trials: only the first so many rows of each dataset."
    )
    eval_steps: Annotated[PositiveInt | None, Role.PLACEMENT] = Field(
        None,
        description="Steps between two evaluations. By default there is only the one at the end, "
        "which there always is.",
    )
    evals_per_epoch: Annotated[PositiveInt | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        description="Instead of eval_steps: number of evaluations in each epoch.",
    )
    per_device_eval_batch_size: Annotated[PositiveInt, Role.TOPOLOGY] = Field(
        8, description="Rows that one process evaluates at once."
    )

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "EvaluationConfig":
        if bool(self.datasets) == (self.prepared is not None):
            raise ValueError("set exactly one of datasets, prepared")
        if self.eval_steps is not None and self.evals_per_epoch is not None:
            raise ValueError("set either eval_steps or evals_per_epoch")
        return self


class EvaluatedStageConfig(TrainingStageConfig):
    """A training stage that can evaluate while it trains."""

    data: DataConfig = Field(description="What is trained on.")
    evaluation: EvaluationConfig | None = Field(
        None, description="What is evaluated on. By default nothing is."
    )

    @model_validator(mode="after")
    def _template_for_evaluation(self) -> "EvaluatedStageConfig":
        evaluation = self.evaluation
        if evaluation and evaluation.datasets and not self.data.datasets:
            raise ValueError(
                "evaluation.datasets are rendered with data.chat_template, which goes with "
                "data.datasets; give evaluation.prepared instead"
            )
        return self

    def in_steps(self, num_rows: int) -> Self:
        """Also with eval_steps in place of evals_per_epoch."""
        config = super().in_steps(num_rows)
        if self.evaluation is None or self.evaluation.evals_per_epoch is None:
            return config
        steps = steps_per_epoch(
            self.evaluation.evals_per_epoch, num_rows, self.training.effective_batch_size
        )
        evaluation = self.evaluation.model_copy(update={"eval_steps": steps})
        return config.model_copy(update={"evaluation": evaluation})

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


class SftLossConfig(Config):
    """The loss of supervised fine-tuning. The formulas are in sft_loss.py."""

    name: Literal["sft", "plw", "ln-plw", "irl"] = Field(
        "plw",
        description="sft: all tokens alike; plw: prompt tokens weigh prompt_loss_weight; ln-plw: "
        "the same, with prompts and completions averaged apart; irl: ln-plw with a temporal "
        "difference of values.",
    )
    prompt_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of a prompt's token in plw, ln-plw and irl, from 0 (left out) to 1 (as "
        "a completion's).",
    )
    sequence_level_loss: bool = Field(
        False,
        description="Normalise within each sequence, then average over the sequences of the global "
        "batch. By default the average is over all its tokens.",
    )
    irl_lambda: NonNegativeFloat = Field(
        0.5, description="Weight of irl's squared temporal difference."
    )
    irl_gamma: float = Field(
        1.0, ge=0, le=1, description="Discount of the next token's value in irl."
    )

    @model_validator(mode="after")
    def _only_what_counts(self) -> "SftLossConfig":
        if self.name != "irl" and (of_irl := not_default(self, _OF_IRL)):
            raise ValueError(f"{of_irl[0]} is a setting of irl (name is {self.name})")
        if self.name == "sft" and not_default(self, ["prompt_loss_weight"]):
            raise ValueError("sft has no prompt_loss_weight: it trains on all tokens; use plw")
        return self


class SftConfig(EvaluatedStageConfig):
    """`entrypoint sft`: supervised fine-tuning."""

    version: ClassVar[int] = 2
    can_share_rows: ClassVar[bool] = True

    sft: SequenceConfig = Field(description="How conversations and texts become rows.")
    loss: SftLossConfig = Field(SftLossConfig(), description="The loss.")

    @model_validator(mode="after")
    def _loss_of_shared_rows(self) -> "SftConfig":
        if self.distributed.context_parallel_size > 1 and self.loss.name == "irl":
            raise ValueError(
                "distributed.context_parallel_size: not with loss.name: irl, which looks at the "
                "token after each"
            )
        return self

    @property
    def rows_are_packed(self) -> bool:
        return self.sft.packing != "none"


class PreferenceLossConfig(Config):
    """The loss of preference training. The formulas are in dpo_loss.py."""

    name: Literal["dpo", "dpo-norm", "ipo", "hinge", "qrpo"] = Field(
        "dpo",
        description="The loss. dpo-norm is dpo with normalize_beta_by_length; qrpo needs quantile "
        "rewards of the answers.",
    )
    beta: PositiveFloat = Field(
        description="How much it costs to leave the reference model: the larger, the nearer the "
        "policy stays."
    )
    normalize_beta_by_length: bool = Field(
        False, description="Divide each answer's beta by its number of tokens."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the pairs that are taken to be labelled the wrong way round, for dpo "
        "and dpo-norm. Below 0.5, where labels say nothing.",
    )
    quantile_transform: Literal["identity", "log", "square", "sqrt", "normal"] = Field(
        "identity",
        description="The function f that qrpo applies to an answer's quantile before it is the "
        "target.",
    )
    normalize_loss_by_length: bool = Field(
        False,
        description="For qrpo: divide an answer's squared error by its number of tokens.",
    )

    @property
    def beta_is_per_length(self) -> bool:
        return self.normalize_beta_by_length or self.name == "dpo-norm"

    @model_validator(mode="after")
    def _only_what_counts(self) -> "PreferenceLossConfig":
        if self.name != "qrpo" and (of_qrpo := not_default(self, _OF_QRPO)):
            raise ValueError(f"{of_qrpo[0]} is a setting of qrpo (name is {self.name})")
        if self.label_smoothing and self.name not in ("dpo", "dpo-norm"):
            raise ValueError(f"label_smoothing is a setting of dpo (name is {self.name})")
        return self


class ReferenceConfig(Config):
    """Where the logprobs of the reference model come from. Its weights are never in memory together
    with the policy's."""

    logprobs: Literal["auto", "stored", "computed"] = Field(
        "auto",
        description="stored: read from the dataset (ref_chosen_logprob, ref_rejected_logprob); "
        "computed: in a pass before training; auto: stored where every pair has them, computed "
        "where none has.",
    )
    ref_model_name_or_path: Annotated[Path | None, Role.INPUT] = Field(
        None, description="Model folder to compute them with. By default model.path."
    )
    tolerance: Annotated[NonNegativeFloat | None, Role.PLACEMENT] = Field(
        None,
        description="How far, in nats a token, a stored logprob may be from what the untrained "
        "model gives in the first step. By default 0.001, or 0.03 where the model computes in 16 "
        "bits.",
    )

    @model_validator(mode="after")
    def _a_model_computes(self) -> "ReferenceConfig":
        if self.ref_model_name_or_path is not None and self.logprobs == "stored":
            raise ValueError("ref_model_name_or_path: only where logprobs are computed")
        return self


class DpoConfig(EvaluatedStageConfig):
    """`entrypoint dpo`: preference training."""

    version: ClassVar[int] = 2

    dpo: PairConfig = Field(description="How preference rows become pairs.")
    loss: PreferenceLossConfig = Field(description="The loss.")
    reference: ReferenceConfig = Field(
        ReferenceConfig(), description="Where the logprobs of the reference model come from."
    )

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


class RewardModelConfig(TrainingStageConfig):
    """`entrypoint reward-model`: a reward model from preference rows. `model` is a language model,
    which gets a new output, or a reward model."""

    data: DataConfig = Field(description="Datasets of preference rows.")
    pairs: PairConfig = Field(
        PairConfig(),
        description="What is too long. By default a pair that would be cut is left out. Packing "
        "and what belongs to a policy is refused.",
    )
    center_rewards_coefficient: NonNegativeFloat = Field(
        0.0,
        description="Weight of the squared sum of a pair's two rewards in the loss, which centers "
        "rewards on 0. 0: they have no fixed zero.",
    )

    @model_validator(mode="after")
    def _pairs_alone(self) -> "RewardModelConfig":
        self.data.require_datasets()
        defaults = PairConfig()
        for key in _OF_A_POLICY:
            if getattr(self.pairs, key) != getattr(defaults, key):
                raise ValueError(f"pairs.{key}: is for training a policy")
        if self.lora is not None:
            raise ValueError("lora: a reward model is trained whole")
        if self.model.float32_logits:
            raise ValueError("model.float32_logits: a reward model has no logits of a vocabulary")
        if self.training.padding_free:
            raise ValueError("training.padding_free: a reward model has one conversation a row")
        if self.distributed.strategy in ("zero3", "fsdp2"):
            raise ValueError("distributed.strategy: a reward model's new output is not divided yet")
        return self
