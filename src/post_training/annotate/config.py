"""Settings that every annotation stage has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from post_training.config.model import Config, Role, not_default
from post_training.core.errors import UsageError
from post_training.data.config import TEMPLATES, SourcesConfig, SpecialTokens
from post_training.models.config import ModelConfig
from post_training.records.run import SHARED_FOLDERS
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

    keeps_pairs: whether the stage's annotator also takes preference rows (data/branches.py);
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

    max_batch_tokens, prompts_per_batch: see models/score.py. With prompts_per_batch 1 a
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


# The configuration of `entrypoint filter`.


class FilterConfig(ChunkedStageConfig):
    """tokenizer: the policy's folder, or one with its tokenizer alone. max_sequence_length: of a
    prompt with a branch, in tokens, by the policy's template. min_branches: a prompt with fewer
    that are short enough is left out; 2, where pairs are to be made of offline branches alone; 0,
    where the rows are prompts without any.
    """

    tokenizer: Annotated[Path, Role.INPUT]
    data: TemplatedDataConfig
    max_sequence_length: PositiveInt
    min_branches: NonNegativeInt = 1


# The configuration of `entrypoint generate`.


class SamplingConfig(Config):
    """n: samples of each prompt. temperature: 0 takes the likeliest token. top_p: the smallest set
    of tokens with this probability is drawn from. max_tokens: a sample that reaches it is
    truncated, its finish_reason `length`. stop: texts that end a sample; they are not part of its
    text, but their tokens are stored.
    """

    n: PositiveInt = 10
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 4096
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _different_samples(self) -> "SamplingConfig":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n: temperature 0 gives one sample {self.n} times; set n: 1")
        return self


class GenerateConfig(ChunkedStageConfig):
    """model_name: what a branch's metadata call the model; by default the fingerprint of its
    folder, which they hold in any case. exclude_truncated: truncated samples are left out, not
    only marked.
    """

    version: ClassVar[int] = 2

    model: ModelConfig
    data: TemplatedDataConfig
    sampling: SamplingConfig = SamplingConfig()
    backend: Annotated[Literal["transformers", "vllm"], Role.TOPOLOGY] = "transformers"
    vllm: VllmConfig = VllmConfig()
    model_name: str | None = None
    exclude_truncated: bool = False

    @model_validator(mode="after")
    def _settings_of_the_backend(self) -> "GenerateConfig":
        check_backend(self)
        return self


# The configuration of `entrypoint logprobs`.


_OF_TRANSFORMERS = ("max_batch_tokens", "prompts_per_batch", "tensor_parallel_size")


class LogprobsConfig(ScoringStageConfig):
    """data: rows of branches, or preference rows, which stay such; the template is the training's.
    model: whose log-probabilities; the one that will be trained.

    backend: who computes them. Measured on CPUs, the two were 2e-7 nats a token apart in float32,
    up to 3.2e-5 with SmolLM2-135M, and 2e-3 in bfloat16. Recipe, so that no dataset holds figures
    of both.
    vllm: of that backend. max_batch_tokens, prompts_per_batch, tensor_parallel_size and
    model.attn_implementation are of transformers alone.
    """

    keeps_pairs: ClassVar[bool] = True

    data: TemplatedDataConfig
    model: ModelConfig
    backend: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _settings_of_the_backend(self) -> "LogprobsConfig":
        check_backend(self, _OF_TRANSFORMERS)
        return self


# The configuration of `entrypoint rewards`.


class RewardConfig(Config):
    """One reward, which a branch will have as rewards.NAME: of a model or of a function.

    function: registered in one of the files of `functions`. model: for sequence classification,
    with one output; it reads conversations by its own template (`model`), or by one of ours.
    max_seq_length: of a conversation in the model's tokens; by default its positions. overlong: a
    longer one is refused, or judged by its beginning and marked, in reward_is_truncated.
    """

    name: Annotated[str, Field(min_length=1)]
    function: str | None = None
    model: ModelConfig | None = None
    chat_template: Literal[(*TEMPLATES, "model")] = "model"
    max_seq_length: PositiveInt | None = None
    overlong: Literal["refuse", "mark"] = "refuse"

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardConfig":
        if (self.function is None) == (self.model is None):
            raise ValueError("set exactly one of function, model")
        changed = not_default(self, ("chat_template", "max_seq_length", "overlong"))
        if self.function is not None and changed:
            raise ValueError(f"{changed[0]} is a setting of a model's reward")
        return self


class RewardsConfig(ScoringStageConfig):
    """functions: Python files that register the functions which the rewards name
    (data/rewards.py)."""

    rewards: Annotated[list[RewardConfig], Field(min_length=1)]
    functions: Annotated[list[Path], Role.INPUT] = Field(default_factory=list)

    @field_validator("rewards")
    @classmethod
    def _names_of_their_own(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        names = [reward.name for reward in rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rewards are called {twice[0]!r}")
        return rewards


# The configuration of `entrypoint select`.


STRATEGIES = ("best-worst", "quantile-buckets", "random", "margin")


class StrategyConfig(Config):
    """name: one of strategies.py. num_pairs: of a prompt, at most; no branch is in two of them.

    min_margin, max_margin: of margin: between the rewards of a pair. best_quantile,
    worst_quantile: of quantile-buckets: the best have at least this one, the worst at most this
    one, or 1/num_ref_rewards where that is more.
    """

    name: Literal[STRATEGIES] = "best-worst"
    num_pairs: PositiveInt = 1
    min_margin: NonNegativeFloat | None = None
    max_margin: NonNegativeFloat | None = None
    best_quantile: Annotated[float, Field(ge=0, le=1)] | None = None
    worst_quantile: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _only_what_counts(self) -> "StrategyConfig":
        for strategy, names in (
            ("margin", ("min_margin", "max_margin")),
            ("quantile-buckets", ("best_quantile", "worst_quantile")),
        ):
            given = [name for name in names if getattr(self, name) is not None]
            if given and self.name != strategy:
                raise ValueError(f"{given[0]} is a setting of {strategy} (name is {self.name})")
        if self.name == "margin" and self.min_margin is None:
            raise ValueError("margin needs a min_margin")
        return self


class SelectConfig(StageConfig):
    """reward: the one that decides, where the branches have several.
    samples: which branches may be chosen or rejected: those that the model generated for
    reference, the others, or both. Quantiles are always taken over the reference ones.
    num_ref_rewards: use the first so many reference rewards; by default all. min_ref_rewards: a
    prompt with fewer is left out. exclude_truncated: a branch that was cut off is no candidate; it
    still counts among the reference rewards.
    """

    data: SourcesConfig
    reward: str | None = None
    samples: Literal["reference", "offline", "both"] = "reference"
    strategy: StrategyConfig = StrategyConfig()
    num_ref_rewards: PositiveInt | None = None
    min_ref_rewards: Annotated[int, Field(ge=0)] = 1
    exclude_truncated: bool = True

    @model_validator(mode="after")
    def _whole_datasets(self) -> "SelectConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        for index, dataset in enumerate(self.data.datasets):
            for key in _OF_A_MIXTURE:
                if getattr(dataset, key) is not None:
                    raise ValueError(f"data.datasets[{index}].{key}: mix the pairs instead")
        return self

    @model_validator(mode="after")
    def _quantiles_of_something(self) -> "SelectConfig":
        if self.strategy.name == "quantile-buckets" and self.min_ref_rewards == 0:
            raise ValueError("min_ref_rewards: quantile-buckets needs at least 1")
        return self
