"""The configuration of `entrypoint sft`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from post_training.config.model import Config, Role
from post_training.data.config import DataConfig, DatasetConfig, SequenceConfig
from post_training.stages.training.config import TrainingStageConfig


class LossConfig(Config):
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
    def _only_what_counts(self) -> "LossConfig":
        # By value: a resolved configuration has every default written out.
        changed = {name for name, value in self if value != type(self).model_fields[name].default}
        if self.name != "irl" and (of_irl := sorted({"irl_lambda", "irl_gamma"} & changed)):
            raise ValueError(f"{of_irl[0]} is a setting of irl (name is {self.name})")
        if self.name == "sft" and "prompt_loss_weight" in changed:
            raise ValueError("sft has no prompt_loss_weight: it trains on all tokens; use plw")
        return self


class EvaluationConfig(Config):
    """datasets: rendered as data.datasets are, a row for each sequence; or prepared, so made.
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


class SftConfig(TrainingStageConfig):
    data: DataConfig
    sft: SequenceConfig
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig | None = None

    @property
    def rows_are_packed(self) -> bool:
        return self.sft.packing != "none"

    @model_validator(mode="after")
    def _template_for_evaluation(self) -> "SftConfig":
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
