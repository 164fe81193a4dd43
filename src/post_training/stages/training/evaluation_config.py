"""Settings of the stages that evaluate while they train: sft and dpo."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from post_training.config.model import Config, Role
from post_training.data.config import DataConfig, DatasetConfig
from post_training.stages.training.config import TrainingStageConfig


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
