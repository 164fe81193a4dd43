"""Settings that every stage has, and the configurations of the stages of this package."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from post_training.config.model import ADDED_LATER, Config, Role
from post_training.core.secrets import variable_secret
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
        description="The run folder. By default runs/STAGE-MODEL-DATA-DIGEST. The digest is of the "
        "recipe and the inputs, so the same run finds its folder again.",
    )
    output_base: Annotated[Path | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        description="Folder in which the run folder is made where run_dir is not set. By default "
        "runs.",
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
    promote: Annotated[Literal["store"] | None, Role.PLACEMENT, ADDED_LATER] = Field(
        None,
        description="store: when the run has finished, its artifacts are copied to "
        "artifacts/store and every file is compared, as `post-training storage promote` does. By "
        "default they are not copied.",
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

    @property
    def is_one_a_node(self) -> bool:
        """Whether one process of it runs on a node, and not one a GPU."""
        return False

    @property
    def own_artifacts(self) -> tuple[str, ...] | None:
        """The folders that this run leaves, where its settings say so and not its stage."""
        return None


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


_PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# What else a run folder holds; the names of outputs name folders beside it.
_OF_THE_RUN = ("run.json", "config.yaml", "slurm", "logs", "work", "cache", "reproduction.json")


class CommandInput(Config):
    """A file or folder that a command reads."""

    name: str = Field(
        pattern=_PLAIN_NAME,
        description="What the command calls it: it is found by this name in the working folder, "
        "as a link, or as a copy of a small file. Letters, digits and . _ -.",
    )
    path: Annotated[Path, Role.INPUT] = Field(description="The file or folder.")


class CommandOutput(Config):
    """A file or folder that a command makes."""

    name: str = Field(
        pattern=_PLAIN_NAME,
        description="The artifact's name: it is kept as RUN/NAME, and pipelines refer to it. "
        "Letters, digits and . _ -.",
    )
    path: str = Field(
        description="Where the command makes it, below its working folder. A single file is kept "
        "as RUN/NAME/FILE."
    )

    @model_validator(mode="after")
    def _is_below(self) -> "CommandOutput":
        path = Path(self.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"path: must be below the working folder (got {self.path!r})")
        if self.name in _OF_THE_RUN:
            raise ValueError(f"name: a run folder has its own {self.name}")
        return self


class ExecConfig(StageConfig):
    """`entrypoint exec`: any command, with the record of a run."""

    command: list[str] = Field(
        min_length=1,
        description="The program and its arguments, as a list: no shell reads them. It is started "
        "in RUN/work, where each input has its name.",
    )
    inputs: list[CommandInput] = Field(
        default_factory=list,
        description="All that the command reads besides the image. Each is fingerprinted before "
        "the command starts, and must be unchanged when it ends.",
    )
    outputs: list[CommandOutput] = Field(
        min_length=1, description="What the command makes: the artifacts of the run."
    )
    unstable: Annotated[list[str], Role.PLACEMENT] = Field(
        default_factory=list,
        description="Patterns of output files that hold times or paths, such as `*.log` or "
        "`checkpoint-*/trainer_state.json`. They stay in RUN/work, are listed in the record and "
        "never compared.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Variables of the command, over those of the container.",
    )
    on_restart: Annotated[Literal["begin", "continue"], Role.PLACEMENT] = Field(
        "begin",
        description="What happens when a run that was stopped starts again. begin: the working "
        "folder is emptied first. continue: it stays, and the command finds its own checkpoints "
        "there.",
    )
    ranks: Annotated[Literal["node", "gpu"], Role.PLACEMENT] = Field(
        "node",
        description="How often the command is started. node: once on each node, as for torchrun. "
        "gpu: once for each GPU, with the variables of its rank.",
    )
    grace_s: Annotated[PositiveInt, Role.PLACEMENT] = Field(
        60,
        description="Seconds that the command has to end after the signal that stops the run. Then "
        "it is killed.",
    )

    @property
    def continues(self) -> bool:
        return self.on_restart == "continue"

    @property
    def is_one_a_node(self) -> bool:
        return self.ranks == "node"

    @property
    def own_artifacts(self) -> tuple[str, ...]:
        return tuple(output.name for output in self.outputs)

    @model_validator(mode="after")
    def _names_are_clear(self) -> "ExecConfig":
        for key, items in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [item.name for item in items]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key}: two are called {twice[0]}")
        linked = {item.name for item in self.inputs}
        places = [Path(output.path) for output in self.outputs]
        for number, place in enumerate(places):
            if place.parts[0] in linked:
                raise ValueError(
                    f"outputs[{number}].path: {place.parts[0]} is an input, which is never written"
                )
            if any(place == other or place in other.parents
                   for other in places[:number] + places[number + 1 :]):  # fmt: skip
                raise ValueError(f"outputs[{number}].path: another output is in {place}")
        for name, value in self.environment.items():
            if not name or set("=\0") & set(name):
                raise ValueError(f"environment: {name!r} can be no variable (= or NUL in it)")
            if kind := variable_secret(name, value):
                raise ValueError(
                    f"environment.{name}: holds a secret ({kind}), and a configuration is recorded"
                )
        return self
