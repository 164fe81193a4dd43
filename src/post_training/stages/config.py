"""Settings that every stage has, and the configurations of the stages of this package."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from post_training.config.model import ADDED_LATER, Config, Role
from post_training.data.config import (
    TEMPLATES,
    DataConfig,
    OnError,
    PairConfig,
    SequenceConfig,
    SourcesConfig,
)


class DebugConfig(Config):
    """Whether the run is a trial."""

    enabled: bool = Field(
        False,
        description="The run is a trial: its record says so, and its folder is below runs/debug "
        "unless run_dir is set.",
    )
    override_existing: bool = Field(
        False,
        description="Remove an earlier trial that is in the run folder. Only trials are ever "
        "removed, and only by trials.",
    )

    @model_validator(mode="after")
    def _only_trials(self) -> "DebugConfig":
        if self.override_existing and not self.enabled:
            raise ValueError("override_existing: only with enabled: true")
        return self


class StageConfig(Config):
    """What every stage has.

    ranks_count: whether the number of processes changes what comes out, and so is identity.
    continues: whether a stopped run is continued, and not begun over.
    version: of the stage's own code. Raise it when the same settings and inputs come to other rows
    or weights: run folders of a pipeline are named by it, and chunks of another version are
    refused.
    """

    version: ClassVar[int] = 1
    ranks_count: ClassVar[bool] = True
    continues: ClassVar[bool] = False

    run_dir: Annotated[Path | None, Role.PLACEMENT] = Field(
        None,
        description="The run folder. By default runs/STAGE-DIGEST, of the recipe and the inputs: "
        "the same run finds its own folder again.",
    )
    num_processes: Annotated[PositiveInt | None, Role.TOPOLOGY] = Field(
        None,
        description="Processes on this machine, where no launcher (srun, torchrun) starts them. "
        "By default one a GPU, and one where there is none.",
    )
    num_threads: Annotated[PositiveInt | None, Role.TOPOLOGY] = Field(
        None,
        description="CPU threads of each process. By default its share of the machine's cores.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Seed of all that is random. At most 2³² − 1: numpy, which trainers seed too, "
        "takes 32 bits.",
    )
    debug: Annotated[DebugConfig, Role.PLACEMENT] = Field(
        DebugConfig(), description="Whether the run is a trial."
    )

    def check_ranks(self, world_size: int) -> None:
        """Errors: UsageError when so many processes can't do this."""

    def record_dir(self, run_dir: Path) -> Path:
        """Where this process's record is, of a run in `run_dir`."""
        return run_dir

    @property
    def is_worker(self) -> bool:
        """Whether it does a share of a run whose record is another's."""
        return False


class InitModelConfig(StageConfig):
    """`entrypoint init-model`: a small model with random weights, and a tokenizer for it."""

    architecture: Literal["llama", "apertus"] = Field(description="Kind of the model.")
    hidden_size: PositiveInt = Field(
        description="Width of the model. A multiple of 2 × num_attention_heads, since rotary "
        "embeddings halve each head."
    )
    num_hidden_layers: PositiveInt = Field(description="Number of layers.")
    num_attention_heads: PositiveInt = Field(description="Attention heads of a layer.")
    num_key_value_heads: PositiveInt = Field(
        description="Heads of keys and values. They are shared evenly, so this divides "
        "num_attention_heads."
    )
    intermediate_size: PositiveInt = Field(description="Width of the MLPs.")
    max_position_embeddings: PositiveInt = Field(description="Longest sequence, in tokens.")
    vocab_size: PositiveInt = Field(
        description="Most tokens that the vocabulary may have, special tokens included."
    )
    tie_word_embeddings: bool = Field(
        False, description="Whether the output layer is the matrix of the embeddings."
    )
    corpus: Annotated[list[Path], Role.INPUT] = Field(
        min_length=1,
        description="Files of rows (as JSONL); the tokenizer is trained on every string in them.",
    )
    chat_template: Literal[TEMPLATES] = Field(
        "chatml", description="Chat template of the tokenizer, one of ours."
    )

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


class MixConfig(StageConfig):
    """`entrypoint mix`: one dataset of rows from several."""

    data: SourcesConfig = Field(
        description="The datasets to mix. max_tokens is refused: rows have no tokens here."
    )
    source_column: str | None = Field(
        None,
        description="Name of a column that is added and holds the name of the row's dataset. By "
        "default none is added.",
    )

    @model_validator(mode="after")
    def _rows_alone(self) -> "MixConfig":
        self.data.require_datasets()
        for index, dataset in enumerate(self.data.datasets):
            if dataset.max_tokens is not None:
                raise ValueError(
                    f"data.datasets[{index}].max_tokens: rows have tokens in prepare and sft only"
                )
        return self


class SplitConfig(StageConfig):
    """`entrypoint split`: a dataset in two, for training and for evaluation."""

    data: SourcesConfig = Field(
        description="The datasets to split, whole: a row that is used twice could be on both "
        "sides, so mix afterwards."
    )
    eval_size: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Rows for evaluation: a share (0.05), or a number (500: an integer)."
    )
    stratify_by: str | None = Field(
        None,
        description="A column. Each of its values has the same share of the evaluation rows as of "
        "all rows. By default each dataset has.",
    )

    @model_validator(mode="after")
    def _whole_datasets(self) -> "SplitConfig":
        # A row that is used twice could be on both sides.
        self.data.require_whole_datasets("split first, then mix")
        return self


class PrepareConfig(StageConfig):
    """`entrypoint prepare`: datasets to token ids and rows. A training configuration can share the
    blocks by `extends`."""

    version: ClassVar[int] = 2

    tokenizer: Annotated[Path, Role.INPUT] = Field(
        description="A model folder, or one with a tokenizer alone."
    )
    data: DataConfig = Field(description="The datasets to prepare.")
    sft: SequenceConfig | None = Field(
        None, description="Prepare rows for supervised fine-tuning. Set exactly one of sft, dpo."
    )
    dpo: PairConfig | None = Field(
        None, description="Prepare pairs for preference training. Set exactly one of sft, dpo."
    )

    @model_validator(mode="after")
    def _something_to_prepare(self) -> "PrepareConfig":
        if not self.data.datasets:
            raise ValueError("data: set datasets; prepared and indexed are for training")
        if (self.sft is None) == (self.dpo is None):
            raise ValueError("set exactly one of sft, dpo: what the rows are prepared for")
        return self


class ControlTokensConfig(Config):
    """Ids of the tokens that stand before and after a turn."""

    user: NonNegativeInt = Field(7, description="Id of the token around a user's turn.")
    assistant: NonNegativeInt = Field(8, description="Id of the token around an assistant's turn.")


class TokenizeConfig(StageConfig):
    """`entrypoint tokenize`: documents with markers to .bin and .idx files."""

    inputs: Annotated[list[Path], Role.INPUT] = Field(
        min_length=1,
        description='JSONL files of documents: {"text": "<<<|user|>>>…<<<|user|>>>…"}.',
    )
    tokenizer: Annotated[Path, Role.INPUT] = Field(
        description="A SentencePiece model, or the folder of a Hugging Face tokenizer."
    )
    control_tokens: ControlTokensConfig = Field(
        ControlTokensConfig(), description="Ids of the tokens that replace the markers."
    )
    eod: str = Field("<|endoftext|>", description="The piece that ends a document.")
    append_eod: bool = Field(True, description="Whether eod is appended to each document.")
    output_prefix: str = Field(
        "data",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Beginning of the files' names, OUTPUT_PREFIX_text_document.bin and so on. "
        "Letters, digits and . _ - alone, since it names files and no folder.",
    )
    max_rows: PositiveInt | None = Field(
        None, description="Stop after so many good documents. By default all are used."
    )
    on_error: OnError = Field(
        "fail",
        description="What a bad line does. fail: end the run; skip: be left out; quarantine: be "
        "left out and copied to RUN/dataset/rejects.jsonl.",
    )
    ignore: Annotated[list[str], ADDED_LATER] = Field(
        default_factory=list,
        description="Columns that are not read although they would change what is trained, as in "
        "the settings of a dataset.",
    )
    num_workers: Annotated[PositiveInt | None, Role.PLACEMENT] = Field(
        None,
        description="Processes that encode. By default one a core, at most 16. The files are the "
        "same for any number.",
    )

    @field_validator("ignore")
    @classmethod
    def _reads_text(cls, ignore: list[str]) -> list[str]:
        if "text" in ignore:
            raise ValueError("text: is what is tokenised")
        return ignore


class ConvertTokenizerConfig(StageConfig):
    """`entrypoint convert-tokenizer`: a SentencePiece model into a Hugging Face tokenizer."""

    sentencepiece_model: Annotated[Path, Role.INPUT] = Field(description="The .model file.")
    corpus: Annotated[list[Path], Role.INPUT] = Field(
        min_length=1,
        description="Files of rows (as JSONL). Both tokenizers must give the same ids for every "
        "string in them.",
    )
    control_tokens: ControlTokensConfig | None = Field(
        None, description="As in `tokenize`. By default the tokenizer has no such tokens."
    )
    eod: str | None = Field(
        None,
        description="The piece that ends a document; it becomes the tokenizer's eos token. By "
        "default it keeps its own.",
    )
