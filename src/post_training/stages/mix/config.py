"""The configuration of `entrypoint mix`."""

from pydantic import model_validator

from post_training.data.config import SourcesConfig
from post_training.stages.config import StageConfig


class MixConfig(StageConfig):
    """source_column: a column that is added, with the name of the row's dataset."""

    data: SourcesConfig
    source_column: str | None = None

    @model_validator(mode="after")
    def _rows_alone(self) -> "MixConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        for index, dataset in enumerate(self.data.datasets):
            if dataset.max_tokens is not None:
                raise ValueError(
                    f"data.datasets[{index}].max_tokens: rows have tokens in prepare and sft only"
                )
        return self
