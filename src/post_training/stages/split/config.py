"""The configuration of `entrypoint split`."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from post_training.data.config import SourcesConfig
from post_training.stages.config import StageConfig

_OF_A_MIXTURE = ("subsample_factor", "duplication_factor", "max_rows", "max_tokens", "weight")


class SplitConfig(StageConfig):
    """eval_size: a share of the rows (0.05), or their number (500). stratify_by: a column; each of
    its values has the same share of the evaluation rows as of all; by default, each dataset."""

    data: SourcesConfig
    eval_size: PositiveInt | Annotated[float, Field(gt=0, lt=1)]
    stratify_by: str | None = None

    @model_validator(mode="after")
    def _whole_datasets(self) -> "SplitConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        for index, dataset in enumerate(self.data.datasets):
            for key in _OF_A_MIXTURE:
                if getattr(dataset, key) is not None:
                    # A row that is used twice could be on both sides.
                    raise ValueError(f"data.datasets[{index}].{key}: split first, then mix")
        return self
