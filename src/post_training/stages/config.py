"""Settings that every stage has."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from post_training.config.model import ADDED_LATER, Config, Role
from post_training.data.config import (
    TEMPLATES,
    DataConfig,
    PairConfig,
    SequenceConfig,
    SourcesConfig,
)


class DebugConfig(Config):
    """enabled: the run is a trial: its record says so, and run_dir is below runs/debug unless set.
    override_existing: a trial that is in the run folder is removed first. Nothing else ever is."""

    enabled: bool = False
    override_existing: bool = False

    @model_validator(mode="after")
    def _only_trials(self) -> "DebugConfig":
        if self.override_existing and not self.enabled:
            raise ValueError("override_existing: only with enabled: true")
        return self


class StageConfig(Config):
    """run_dir: the run folder. num_processes: local processes, when no launcher started us.
    num_threads: CPU threads of each process; by default, its share of the machine's cores.

    ranks_count: whether the number of processes changes what comes out, and so is identity.
    continues: whether what was stopped is gone on from, and not begun over. version: of the stage's
    own code; raise it when the same settings and inputs come to other rows or weights. Run folders
    of a pipeline are named by it, and chunks of another version are refused."""

    version: ClassVar[int] = 1
    ranks_count: ClassVar[bool] = True
    continues: ClassVar[bool] = False

    run_dir: Annotated[Path | None, Role.PLACEMENT] = None
    num_processes: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    num_threads: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    # numpy, which every trainer seeds too, knows 32 bits.
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    debug: Annotated[DebugConfig, Role.PLACEMENT] = DebugConfig()

    def check_ranks(self, world_size: int) -> None:
        """Errors: UsageError when so many processes can't do this."""

    def record_dir(self, run_dir: Path) -> Path:
        """Where this process's record is, of a run in `run_dir`."""
        return run_dir

    @property
    def is_worker(self) -> bool:
        """Whether it does a share of a run whose record is another's."""
        return False


# The configuration of `entrypoint init-model`.


class InitModelConfig(StageConfig):
    """corpus: JSONL files; the tokenizer is trained on every string in them."""

    architecture: Literal["llama", "apertus"]
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool = False
    corpus: Annotated[list[Path], Role.INPUT, Field(min_length=1)]
    chat_template: Literal[TEMPLATES] = "chatml"

    @model_validator(mode="after")
    def _sizes_fit(self) -> "InitModelConfig":
        # An odd head size has no rotary halves; the others are divided among the heads.
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 × num_attention_heads "
                f"= {2 * self.num_attention_heads} (got {self.hidden_size})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads "
                f"= {self.num_key_value_heads} (got {self.num_attention_heads})"
            )
        return self


# The configuration of `entrypoint mix`.


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


# The configuration of `entrypoint split`.


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


# The configuration of `entrypoint prepare`.


class PrepareConfig(StageConfig):
    """tokenizer: a model folder, or one with a tokenizer alone. data, and sft or dpo: as in a
    training configuration, which can share them by `extends`."""

    version: ClassVar[int] = 2

    tokenizer: Annotated[Path, Role.INPUT]
    data: DataConfig
    sft: SequenceConfig | None = None
    dpo: PairConfig | None = None

    @model_validator(mode="after")
    def _something_to_prepare(self) -> "PrepareConfig":
        if not self.data.datasets:
            raise ValueError("data: set datasets; prepared and indexed are for training")
        if (self.sft is None) == (self.dpo is None):
            raise ValueError("set exactly one of sft, dpo: what the rows are prepared for")
        return self


# The configuration of `entrypoint tokenize`.


class ControlTokensConfig(Config):
    """Ids of the tokens that stand around a turn, before and after it."""

    user: NonNegativeInt = 7
    assistant: NonNegativeInt = 8


class TokenizeConfig(StageConfig):
    """inputs: JSONL files of documents, `{"text": "<<<|user|>>>…<<<|user|>>>…"}`.
    tokenizer: a SentencePiece model, or the folder of a Hugging Face tokenizer.
    eod: the piece that ends a document, where append_eod says so.
    output_prefix: files are OUTPUT_PREFIX_text_document.bin and so on. max_rows: of good documents.
    on_error: of a bad line: stop; leave it out; or also copy it to rejects.jsonl.
    ignore: columns that are not to be read, as in a dataset's settings (data/config.py).
    num_workers: processes; by default one for each core, at most 16.
    """

    inputs: Annotated[list[Path], Role.INPUT, Field(min_length=1)]
    tokenizer: Annotated[Path, Role.INPUT]
    control_tokens: ControlTokensConfig = ControlTokensConfig()
    eod: str = "<|endoftext|>"
    append_eod: bool = True
    output_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "data"
    max_rows: PositiveInt | None = None
    on_error: Literal["fail", "skip", "quarantine"] = "fail"
    ignore: Annotated[list[str], ADDED_LATER] = Field(default_factory=list)
    num_workers: Annotated[PositiveInt | None, Role.PLACEMENT] = None

    @field_validator("ignore")
    @classmethod
    def _reads_text(cls, ignore: list[str]) -> list[str]:
        if "text" in ignore:
            raise ValueError("text: is what is tokenised")
        return ignore


# The configuration of `entrypoint convert-tokenizer`.


class ConvertTokenizerConfig(StageConfig):
    """sentencepiece_model: the .model file. corpus: files of rows, as JSONL and the like; the ids
    of every string in them must be equal. control_tokens: as in `tokenize`, where there are any.
    eod: the piece that ends a document; it becomes the tokenizer's eos token.
    """

    sentencepiece_model: Annotated[Path, Role.INPUT]
    corpus: Annotated[list[Path], Role.INPUT, Field(min_length=1)]
    control_tokens: ControlTokensConfig | None = None
    eod: str | None = None
