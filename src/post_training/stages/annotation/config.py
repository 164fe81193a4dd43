"""Settings that every annotation stage has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from post_training.config.model import Config, Role, not_default
from post_training.core.errors import UsageError
from post_training.data.config import TEMPLATES, SourcesConfig, SpecialTokens
from post_training.records.run_record import SHARED_FOLDERS
from post_training.stages.config import StageConfig

_OF_A_MIXTURE = ("subsample_factor", "duplication_factor", "max_rows", "max_tokens", "weight")
_OF_ITS_MODEL = ("attn_implementation",)
_CHUNKS, _WORKERS = SHARED_FOLDERS


class WorkersConfig(Config):
    """index: this process is worker number `index` of `count`, as in an array of jobs. Workers of
    one run share its folder, at once or one after another, in any number; each has its record in
    RUN/workers/INDEX. A run without an index does what is left, and puts the chunks together.

    A worker begins with the chunks whose number modulo `count` is its own, then takes any that
    nobody holds. Processes that a launcher starts together are workers too.
    """

    index: NonNegativeInt | None = None
    count: PositiveInt = 1

    @model_validator(mode="after")
    def _one_of_them(self) -> "WorkersConfig":
        if self.index is not None and self.index >= self.count:
            raise ValueError(f"index: must be < count, {self.count} (got {self.index})")
        return self


class VllmConfig(Config):
    """tensor_parallel_size: GPUs of one engine. batch_invariant: kernels whose bits don't depend on
    what else is in the batch (GPUs of compute capability 8.0 and newer); without them the rows of
    two runs differ. max_model_len: by default the model's. max_restarts: of an engine that
    died, one after another; halving takes 1 + log2(chunk_rows) to find the row that did it.
    """

    tensor_parallel_size: Annotated[PositiveInt, Role.TOPOLOGY] = 1
    batch_invariant: Annotated[bool, Role.TOPOLOGY] = True
    max_model_len: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), Role.PLACEMENT] = 0.9
    max_restarts: Annotated[NonNegativeInt, Role.PLACEMENT] = 16


def check_backend(config: Any, of_transformers: Sequence[str] = ()) -> None:
    """config: has backend (transformers or vllm), vllm, and model. of_transformers: its settings
    that vLLM has no use for, beside model.attn_implementation.

    Errors: ValueError for one that is set and would not be heeded.
    """
    if config.backend == "transformers":
        others = not_default(config, ["vllm"])
    else:
        others = not_default(config, of_transformers)
        others += [f"model.{key}" for key in not_default(config.model, _OF_ITS_MODEL)]
    if others:
        raise ValueError(f"{others[0]} is no setting of backend: {config.backend}")


class TemplatedDataConfig(SourcesConfig):
    """What is annotated, and how a model reads it. The settings are those of DataConfig."""

    chat_template: Literal[(*TEMPLATES, "model")]
    special_tokens: SpecialTokens = SpecialTokens()
    control_tokens: Literal["refuse", "keep"] = "refuse"


class ChunkedStageConfig(StageConfig):
    """data: what is annotated. data.on_error is also for rows that the stage finds bad.
    chunk_rows: of one piece of work; a killed worker loses what it did of one.
    max_failed_chunks: a worker that fails in more of them ends at once; else at its end.
    max_failed_rows: at which the model or its engine failed, and which a worker leaves out as bad
    rows; at the next one it ends. By default none is: such a failure is no row's fault.

    keeps_pairs: whether the stage's annotator also takes preference rows (data/preference_rows.py);
    for others they become branches.
    """

    version: ClassVar[int] = 2
    ranks_count: ClassVar[bool] = False
    continues: ClassVar[bool] = True
    keeps_pairs: ClassVar[bool] = False

    data: SourcesConfig
    chunk_rows: PositiveInt = 256
    workers: Annotated[WorkersConfig, Role.PLACEMENT] = WorkersConfig()
    max_failed_chunks: Annotated[NonNegativeInt, Role.PLACEMENT] = 0
    max_failed_rows: Annotated[NonNegativeInt, Role.PLACEMENT] = 0

    @model_validator(mode="after")
    def _left_out_only_where_asked(self) -> "ChunkedStageConfig":
        if self.max_failed_rows and self.data.on_error == "fail":
            raise ValueError("max_failed_rows: leaves rows out, and data.on_error is fail")
        return self

    @model_validator(mode="after")
    def _whole_datasets(self) -> "ChunkedStageConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        for index, dataset in enumerate(self.data.datasets):
            for key in _OF_A_MIXTURE:
                if getattr(dataset, key) is not None:
                    raise ValueError(f"data.datasets[{index}].{key}: mix first, then annotate")
        return self

    def record_dir(self, run_dir: Path) -> Path:
        if self.workers.index is None:
            return run_dir
        return run_dir / _WORKERS / str(self.workers.index)

    @property
    def is_worker(self) -> bool:
        return self.workers.index is not None

    @property
    def is_in_step(self) -> bool:
        """Whether all processes of the run hold one model together, and so are one worker."""
        return False

    def chunks_dir(self, record_dir: Path) -> Path:
        """Where all of the run's workers find the chunks. record_dir: of this process."""
        run_dir = record_dir.parents[1] if self.is_worker else record_dir
        return run_dir / _CHUNKS


class ScoringStageConfig(ChunkedStageConfig):
    """A stage in which a model reads what is there.

    max_batch_tokens, prompts_per_batch: see models/shared_prompt.py. With prompts_per_batch 1 a
    row's figures depend on that row alone. tensor_parallel_size: over how many processes each layer
    is spread, for a model that one GPU can't hold: all processes of the run, which are then one
    worker. An array of jobs has several.
    """

    max_batch_tokens: Annotated[PositiveInt, Role.TOPOLOGY] = 32768
    prompts_per_batch: Annotated[PositiveInt, Role.TOPOLOGY] = 1
    tensor_parallel_size: Annotated[PositiveInt, Role.TOPOLOGY] = 1

    @property
    def is_in_step(self) -> bool:
        return self.tensor_parallel_size > 1

    def check_ranks(self, world_size: int) -> None:
        if self.tensor_parallel_size not in (1, world_size):
            raise UsageError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, and the run has "
                f"{world_size} processes: must be equal",
                hint="more of such models are workers of one run, each a job of its own",
            )
