"""The configurations of the annotation stages: `entrypoint filter`, `generate`, `logprobs`,
`rewards` and `select`."""

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

from post_training.config.model import INPUT_IF_PATH, Config, Role, not_default
from post_training.core.errors import UsageError
from post_training.data.config import ChatTemplate, SourcesConfig, TemplatedDataConfig
from post_training.models.config import ModelConfig, ScoredModelConfig, check_float32_logits
from post_training.records.run import SHARED_FOLDERS
from post_training.stages.config import StageConfig

STRATEGIES = ("best-worst", "quantile-buckets", "random", "margin")
# Settings of a scoring stage that vLLM has no use for.
_OF_TRANSFORMERS = ("max_batch_tokens", "prompts_per_batch", "tensor_parallel_size")
_CHUNKS, _WORKERS = SHARED_FOLDERS


class WorkersConfig(Config):
    """Which share of the chunks a process begins with, where an array of jobs does a run together.

    Workers of one run share its folder, at once or one after another, in any number; each has its
    record in RUN/workers/INDEX. A worker begins with the chunks whose number modulo `count` is its
    own, then takes any that nobody holds. Processes that a launcher starts together are workers
    too.
    """

    index: NonNegativeInt | None = Field(
        None,
        description="Number of this worker, from 0 to count − 1. A run without one does what is "
        "left, and puts the chunks together.",
    )
    count: PositiveInt = Field(1, description="Number of workers that do the run together.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "WorkersConfig":
        if self.index is not None and self.index >= self.count:
            raise ValueError(f"index: must be < count, {self.count} (got {self.index})")
        return self


class VllmConfig(Config):
    """How a vLLM engine runs."""

    tensor_parallel_size: Annotated[PositiveInt, Role.TOPOLOGY] = Field(
        1, description="GPUs over which one engine spreads the model."
    )
    batch_invariant: Annotated[bool, Role.TOPOLOGY] = Field(
        True,
        description="Use kernels whose bits do not depend on what else is in the batch (GPUs of "
        "compute capability 8.0 and newer). Without them the rows of two runs differ. On ROCm it "
        "must be false.",
    )
    max_model_len: Annotated[PositiveInt | None, Role.TOPOLOGY] = Field(
        None,
        description="Longest sequence, prompt and answer, in tokens. By default the model's "
        "positions; a smaller number needs less memory.",
    )
    gpu_memory_utilization: Annotated[float, Role.PLACEMENT] = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory that vLLM may take."
    )
    max_restarts: Annotated[NonNegativeInt, Role.PLACEMENT] = Field(
        16,
        description="How often in a row an engine that died is started again. To find the row that "
        "did it by halving takes 1 + log2(chunk_rows) starts.",
    )


def check_backend(config: Any, of_transformers: Sequence[str] = ()) -> None:
    """Refuse what would be ignored: a setting of the other backend that is not at its default.

    config: a stage's, with backend (transformers or vllm), vllm and model.
    of_transformers: settings that vLLM has no use for, beside model.attn_implementation.
    Errors: ValueError.
    """
    if config.backend == "transformers":
        others = not_default(config, ["vllm"])
    else:
        others = not_default(config, of_transformers)
        others += [f"model.{key}" for key in not_default(config.model, ["attn_implementation"])]
    if others:
        raise ValueError(f"{others[0]} is no setting of backend: {config.backend}")


class ChunkedStageConfig(StageConfig):
    """A stage whose rows are annotated in chunks, by any number of workers.

    keeps_pairs: whether the stage's annotator also takes preference rows (data/branches.py);
    for others they become branches.
    """

    version: ClassVar[int] = 2
    ranks_count: ClassVar[bool] = False
    continues: ClassVar[bool] = True
    keeps_pairs: ClassVar[bool] = False

    data: SourcesConfig = Field(
        description="What is annotated. on_error is also for rows that the stage itself finds bad."
    )
    chunk_rows: PositiveInt = Field(
        256, description="Rows in a piece of work. A killed worker loses what it did of one."
    )
    workers: Annotated[WorkersConfig, Role.PLACEMENT] = Field(
        WorkersConfig(), description="Which worker of an array of jobs this is."
    )
    max_failed_chunks: Annotated[NonNegativeInt, Role.PLACEMENT] = Field(
        0,
        description="A worker that fails in more chunks than this ends at once. With fewer it does "
        "the rest, and fails at its end.",
    )
    max_failed_rows: Annotated[NonNegativeInt, Role.PLACEMENT] = Field(
        0,
        description="Rows at which the model or its engine failed that a worker leaves out as bad; "
        "at the next one it ends. By default none: such a failure is seldom the row's fault.",
    )

    @model_validator(mode="after")
    def _left_out_only_where_asked(self) -> "ChunkedStageConfig":
        if self.max_failed_rows and self.data.on_error == "fail":
            raise ValueError("max_failed_rows: leaves rows out, and data.on_error is fail")
        return self

    @model_validator(mode="after")
    def _whole_datasets(self) -> "ChunkedStageConfig":
        self.data.require_whole_datasets("mix first, then annotate")
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
    """A stage in which a model reads what is there."""

    max_batch_tokens: Annotated[PositiveInt, Role.TOPOLOGY] = Field(
        32768,
        description="Tokens of a batch, padding and the prompt of each row included. A longer row "
        "is a batch of its own.",
    )
    prompts_per_batch: Annotated[PositiveInt, Role.TOPOLOGY] = Field(
        1,
        description="Prompts that are computed together. With 1 the values of a row depend on that "
        "row alone, to the bit.",
    )
    tensor_parallel_size: Annotated[PositiveInt, Role.TOPOLOGY] = Field(
        1,
        description="Processes over which each layer is spread, for a model that one GPU can't "
        "hold: 1, or all processes of the run, which are then one worker.",
    )

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


class FilterConfig(ChunkedStageConfig):
    """`entrypoint filter`: leave out branches that are too long."""

    tokenizer: Annotated[Path, Role.INPUT] = Field(
        description="The policy's model folder, or one with its tokenizer alone."
    )
    data: TemplatedDataConfig = Field(description="What is filtered, and the policy's template.")
    max_sequence_length: PositiveInt = Field(
        description="Tokens of a prompt with a branch, at most, by the policy's template."
    )
    min_branches: NonNegativeInt = Field(
        1,
        description="A prompt with fewer branches that are short enough is left out. Use 2 where "
        "pairs are made of offline branches alone, 0 where the rows are prompts without any.",
    )


class SamplingConfig(Config):
    """How completions are sampled."""

    n: PositiveInt = Field(
        10, description="Samples of each prompt. At temperature 0 just one: all would be the same."
    )
    temperature: NonNegativeFloat = Field(
        1.0, description="The logits are divided by it. 0 takes the likeliest token."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw from the smallest set of tokens that has this probability. 1: from all.",
    )
    max_tokens: PositiveInt = Field(
        4096,
        description="Longest sample, in tokens. One that reaches it is truncated, and its "
        "finish_reason is length.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Texts that end a sample. They are not part of its text, but their tokens are "
        "stored.",
    )

    @model_validator(mode="after")
    def _different_samples(self) -> "SamplingConfig":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n: temperature 0 gives one sample {self.n} times; set n: 1")
        return self


class GenerateConfig(ChunkedStageConfig):
    """`entrypoint generate`: sample completions of each prompt."""

    version: ClassVar[int] = 2

    model: ModelConfig = Field(description="The model that samples.")
    data: TemplatedDataConfig = Field(description="The prompts, and how the model reads them.")
    sampling: SamplingConfig = Field(SamplingConfig(), description="How completions are sampled.")
    backend: Annotated[Literal["transformers", "vllm"], Role.TOPOLOGY] = Field(
        "transformers", description="Library that samples."
    )
    vllm: VllmConfig = Field(VllmConfig(), description="Settings of the backend vllm alone.")
    model_name: str | None = Field(
        None,
        description="What the metadata of a branch call the model. By default the fingerprint of "
        "its folder, which they hold in any case.",
    )
    exclude_truncated: bool = Field(
        False,
        description="Leave out samples that were truncated. By default they are only marked.",
    )

    @model_validator(mode="after")
    def _settings_of_the_backend(self) -> "GenerateConfig":
        check_backend(self)
        return self


class LogprobsConfig(ScoringStageConfig):
    """`entrypoint logprobs`: a model's log-probabilities of answers."""

    keeps_pairs: ClassVar[bool] = True

    data: TemplatedDataConfig = Field(
        description="Rows of branches, or preference rows, which stay such. The template must be "
        "the one of the training."
    )
    model: ScoredModelConfig = Field(
        description="The model whose log-probabilities these are: the one that will be trained."
    )
    # Measured on CPUs, the two backends were 2e-7 nats a token apart in float32, up to 3.2e-5 with
    # SmolLM2-135M, and 2e-3 in bfloat16. So it is recipe: no dataset holds values of both.
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="Library that computes them. max_batch_tokens, prompts_per_batch, "
        "tensor_parallel_size and model.attn_implementation belong to transformers alone.",
    )
    vllm: VllmConfig = Field(VllmConfig(), description="Settings of the backend vllm alone.")

    @model_validator(mode="after")
    def _settings_of_the_backend(self) -> "LogprobsConfig":
        check_backend(self, _OF_TRANSFORMERS)
        if self.model.float32_logits and self.backend == "vllm":
            raise ValueError("model.float32_logits: only with backend: transformers")
        check_float32_logits(self.model, computes_in_16_bits=self.model.dtype == "bfloat16")
        return self


class RewardConfig(Config):
    """One reward, of a model or of a function."""

    name: str = Field(
        min_length=1,
        description="Name of the reward: a branch has it as rewards.NAME, so no two have the same.",
    )
    function: str | None = Field(
        None,
        description="Name of a function that is registered in a file of `functions`. Set either "
        "function or model.",
    )
    model: ModelConfig | None = Field(
        None, description="A model for sequence classification with one output, the reward."
    )
    chat_template: Annotated[ChatTemplate, INPUT_IF_PATH] = Field(
        "model",
        description="Template by which the model reads a conversation: its own (model), one of "
        "ours, one of a published model, or a file of your own (path/to/x.jinja).",
    )
    max_seq_length: PositiveInt | None = Field(
        None,
        description="Tokens of a conversation, at most. By default as many as the model has "
        "positions.",
    )
    overlong: Literal["refuse", "mark"] = Field(
        "refuse",
        description="What becomes of a longer one. refuse: it is bad; mark: it is judged by its "
        "beginning, and marked in reward_is_truncated.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardConfig":
        if (self.function is None) == (self.model is None):
            raise ValueError("set exactly one of function, model")
        changed = not_default(self, ("chat_template", "max_seq_length", "overlong"))
        if self.function is not None and changed:
            raise ValueError(f"{changed[0]} is a setting of a model's reward")
        return self


class RewardsConfig(ScoringStageConfig):
    """`entrypoint rewards`: rewards of answers, by models and functions."""

    rewards: list[RewardConfig] = Field(min_length=1, description="The rewards, at least one.")
    functions: Annotated[list[Path], Role.INPUT] = Field(
        default_factory=list,
        description="Python files that register the functions which the rewards name.",
    )

    @field_validator("rewards")
    @classmethod
    def _names_of_their_own(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        names = [reward.name for reward in rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rewards are called {twice[0]!r}")
        return rewards


class StrategyConfig(Config):
    """How pairs are chosen among the branches of a prompt (pairs.py)."""

    name: Literal[STRATEGIES] = Field(
        "best-worst",
        description="best-worst: the best with the worst, and so on inwards; quantile-buckets: one "
        "of the best with one of the worst by quantile; random; margin: pairs whose rewards differ "
        "by so much.",
    )
    num_pairs: PositiveInt = Field(
        1, description="Pairs of a prompt, at most. No branch is in two of them."
    )
    min_margin: NonNegativeFloat | None = Field(
        None, description="Of margin, which needs it: least difference of a pair's rewards."
    )
    max_margin: NonNegativeFloat | None = Field(
        None, description="Of margin: largest difference of a pair's rewards. By default any."
    )
    best_quantile: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Of quantile-buckets: the best have at least this quantile. By default 1.",
    )
    worst_quantile: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Of quantile-buckets: the worst have at most this quantile, or 1 / (reference "
        "rewards) where that is more. By default 0.2.",
    )

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
    """`entrypoint select`: preference rows from rewarded branches."""

    data: SourcesConfig = Field(description="Rows of branches with rewards.")
    reward: str | None = Field(
        None, description="Name of the reward that decides. Needed where branches have several."
    )
    samples: Literal["reference", "offline", "both"] = Field(
        "reference",
        description="Which branches may be in a pair: those that the model itself generated "
        "(reference), the others (offline), or both. Quantiles are always over the reference ones.",
    )
    strategy: StrategyConfig = Field(
        StrategyConfig(), description="How pairs are chosen among the branches of a prompt."
    )
    num_ref_rewards: PositiveInt | None = Field(
        None, description="Use the first so many reference rewards of a prompt. By default all."
    )
    min_ref_rewards: NonNegativeInt = Field(
        1, description="A prompt with fewer reference rewards is left out."
    )
    exclude_truncated: bool = Field(
        True,
        description="A branch that was cut off is in no pair. It still counts among the reference "
        "rewards.",
    )

    @model_validator(mode="after")
    def _whole_datasets(self) -> "SelectConfig":
        self.data.require_whole_datasets("mix the pairs instead")
        return self

    @model_validator(mode="after")
    def _quantiles_of_something(self) -> "SelectConfig":
        if self.strategy.name == "quantile-buckets" and self.min_ref_rewards == 0:
            raise ValueError("min_ref_rewards: quantile-buckets needs at least 1")
        return self
