"""The `data`, `sft` and `dpo` blocks of a configuration: what is read, and how it becomes rows."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from post_training.config.faults import nearest
from post_training.config.model import ADDED_LATER, INPUT_IF_PATH, Config, Role, not_default

# The formats, and the columns that each is made of; those in the second tuple may be missing.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("input", "system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "tools")),
    "text": (("text",), ()),
    "preference": (("chosen", "rejected"), ("prompt", "input", "system", "tools")),
    "swissai": (("initial_prompt", "conversation_branches"), ()),
    # For annotation: in training an answer is missing, so there the settings have to say so.
    "prompt": (("prompt",), ("input", "system", "tools")),
}
TEMPLATES = (
    *("chatml", "tulu", "zephyr", "mistral", "mistral-v3-tekken", "mistral-v7-tekken"),
    *("llama-3", "apertus", "plain"),
)
# Templates of models as they were published, by our names. TRL's package has the files; where it
# has none (None), the format is written anew in chat/jinja/published. Of TRL's further files some
# can't be used: docs/reference/templates.md says why.
PUBLISHED_TEMPLATES: dict[str, str | None] = {
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3-2507": "qwen3_instruct_2507",
    "llama-3.1": "llama3_1",
    "llama-3.2": "llama3_2",
    "gemma3": "gemma3",
    "gpt-oss": "gptoss",
    "phi-3": "phi3",
    "phi-3.5": "phi3_5",
    "cohere": "cohere2",
    "lfm2": "lfm2_v2",
    "olmo3": None,
    "smollm3": None,
}
# Settings that choose among a dataset's rows; a stage that keeps every row refuses them.
_CHOOSE_ROWS = ("subsample_factor", "duplication_factor", "max_rows", "max_tokens", "weight")

# How a row becomes tokens, and which are trained: .bin/.idx files have both.
_FOR_TEXTS = (
    "template_date",
    "history_thoughts",
    "train_on",
    "train_on_thoughts",
    "control_tokens",
)

OnError = Literal["fail", "skip", "quarantine"]
Packing = Literal["none", "bfd", "k_bin_packed", "next_fit"]


def find_template(value: Any) -> str | Path:
    """A name of a chat template as it is, and a file as its path. Errors: ValueError for others."""
    names = (*TEMPLATES, *PUBLISHED_TEMPLATES, "model")
    if isinstance(value, Path) or value in names:
        return value
    if isinstance(value, str) and value.endswith(".jinja"):
        return Path(value)
    raise ValueError(
        f"must be a file that ends in .jinja, or one of {', '.join(names)} "
        f"(got {value!r}){nearest(str(value), names)}"
    )


# A name, or a file of the user's own.
ChatTemplate = Annotated[str | Path, PlainValidator(find_template)]
HistoryThoughts = Literal["as_template", "keep", "refuse"]
_TEMPLATE = (
    "Template that turns messages into text: one of ours, one of a published model, a file of your "
    "own (path/to/x.jinja), or model, the tokenizer's own."
)
_TEMPLATE_DATE = (
    "Date that a template writes which asks for today's, such as 2026-07-26. Without it, a "
    "template that can do without writes its own default, and another is refused. With it, apertus "
    "writes Apertus' own system message where a row has none."
)
_HISTORY_THOUGHTS = (
    "Where a template does not write an earlier turn, or what stood before it, as it was then. "
    "as_template: each turn is trained after the history that a server sends, in several rows; "
    "keep: in one row, as it was said; refuse: the row is bad."
)
ControlTokens = Literal["refuse", "keep"]
_CONTROL_TOKENS = (
    "A special token written inside a message's text: refuse makes the row bad, keep encodes it as "
    "the special token, which lets a text end its own turn."
)
_PACKING = (
    "How sequences share a row, each seeing only itself. none: one a row; bfd: best fit, the "
    "longest first, over the whole dataset; k_bin_packed: best fit among 16 open rows, in the "
    "data's order; next_fit: only the last row is open."
)


class MessageFields(Config):
    """The names of the fields of a message, where they are not the usual ones."""

    role: str | None = Field(
        None, description="Field with the speaker. By default role or from, whichever is there."
    )
    content: str | None = Field(
        None, description="Field with the text. By default content or value, whichever is there."
    )
    weight: str | None = Field(
        None,
        description="Field with the weight of the message in the loss. By default the usual names "
        "(weight, train and others) are recognised.",
    )
    parts_joined_by: Annotated[str | None, ADDED_LATER] = Field(
        None,
        description="What to put between several texts of one content (a list of parts): nothing "
        '(""), as most templates do, or a line break, as vLLM. By default such rows are bad.',
    )


class DatasetConfig(Config):
    """One source of rows: a file or a folder (`path`), or a dataset of the Hugging Face hub."""

    name: str | None = Field(
        None,
        description="What reports and metrics call the dataset. By default the file's name, or "
        "hub/subset/split.",
    )
    path: Annotated[Path | None, Role.INPUT] = Field(
        None,
        description="A .jsonl, .ndjson, .json or .parquet file, or a folder that `datasets` saved. "
        "Set either path or hub.",
    )
    hub: str | None = Field(
        None,
        description="Name of a hub dataset, such as openai/gsm8k. `post-training data fetch` must "
        "have fetched it: a run itself downloads nothing.",
    )
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = Field(
        None,
        description="Commit of the hub dataset, 40 hexadecimal digits; a branch can change. "
        "`post-training data fetch` prints it.",
    )
    subset: str | None = Field(
        None, description="Subset (configuration) of the hub dataset. By default its only one."
    )
    split: str | None = Field(
        None,
        description="Which split to read, such as train. A hub dataset needs it, a saved folder "
        "only where it has several, and a file has none.",
    )
    format: Literal[tuple(FORMATS)] | None = Field(
        None,
        description="Format of the rows. By default it is recognised by the columns; prompt is "
        "never recognised, since rows without answers can only be annotated.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="{column of the format: column of the file}, where the names differ. All "
        "columns that the format needs must be named.",
    )
    message_fields: MessageFields = Field(
        MessageFields(), description="Names of the fields of a message, where they are unusual."
    )
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] = Field(
        default_factory=dict,
        description="{role in the file: our role}, where the file's roles are unusual.",
    )
    ignore: Annotated[list[str], ADDED_LATER] = Field(
        default_factory=list,
        description="Columns (label) and fields of messages (messages[].name) that are not read "
        "although they would change the text or the training. Without this, a row that fills one "
        "is refused.",
    )
    transform: str | None = Field(
        None,
        description="Name of a function that each row goes through first: registered in a file of "
        "`transforms`, or built in for public datasets (`post-training data kinds` lists them).",
    )
    subsample_factor: PositiveFloat | PositiveInt | None = Field(
        None,
        description="Use only a share of the rows (0.5: half), or a number of them (500: an "
        "integer), chosen at random with the seed.",
    )
    duplication_factor: PositiveFloat | None = Field(
        None,
        description="How often each row is used, after subsampling. 2.5: twice, and half of the "
        "rows a third time.",
    )
    max_rows: PositiveInt | None = Field(
        None, description="At most so many rows, after subsampling and duplication."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="At most so many tokens, after subsampling and duplication."
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Share of this dataset in the rows of the mixture, relative to the weights of "
        "the others. Larger datasets are cut until the shares are right.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DatasetConfig":
        if (self.path is None) == (self.hub is None):
            raise ValueError("set exactly one of path, hub")
        if self.path is not None and (self.revision or self.subset):
            raise ValueError("revision and subset belong to hub, not to path")
        return self

    @model_validator(mode="after")
    def _columns_of_one_format(self) -> "DatasetConfig":
        if self.columns:
            format_of_columns(self.columns, self.format)
        return self

    @model_validator(mode="after")
    def _read_or_ignored(self) -> "DatasetConfig":
        if both := [name for name in self.columns.values() if name in self.ignore]:
            raise ValueError(f"columns, ignore: {both[0]} is in both")
        return self

    @model_validator(mode="after")
    def _subsample(self) -> "DatasetConfig":
        factor = self.subsample_factor
        if factor == 1 and isinstance(factor, int):
            raise ValueError("subsample_factor: 1 is one row; write 1.0 for all rows")
        if isinstance(factor, float) and factor > 1:
            raise ValueError(
                f"subsample_factor: a share is at most 1.0, a number of rows an integer "
                f"(got {factor})"
            )
        return self


class SpecialTokens(Config):
    """The tokenizer's special tokens, where they should be others than its own."""

    bos_token: str | None = Field(None, description="Token at the beginning of a sequence.")
    eos_token: str | None = Field(
        None, description="Token that ends an answer; sampling stops at it."
    )
    pad_token: str | None = Field(None, description="Token that fills rows up; never trained on.")


class FunctionLimits(Config):
    """Limits for transforms and reward functions; a function that exceeds one ends the run."""

    timeout_s: PositiveFloat = Field(
        120.0, description="Seconds that one call may take, and the loading of the files."
    )
    max_result_bytes: PositiveInt = Field(
        64 << 20, description="Bytes that one call may return, serialised."
    )
    max_printed_bytes: PositiveInt = Field(
        1 << 20,
        description="Bytes of output that are shown of each process; what it prints beyond them is "
        "left out, and does not end the run.",
    )


class DecontaminateConfig(Config):
    """Rows that say what a benchmark asks are left out, so that its score stays one."""

    against: Annotated[list[Path], Field(min_length=1), Role.INPUT] = Field(
        description="Files of benchmarks (.jsonl, .json, .parquet, or a saved folder): every text "
        "of every row is compared with, whatever its column."
    )
    ngram: PositiveInt = Field(
        13,
        description="How many words in a row have to be the same; signs and case don't count.",
    )


class SourcesConfig(Config):
    """The datasets, and what becomes of their bad rows."""

    datasets: list[DatasetConfig] = Field(
        default_factory=list, description="The datasets, in order; their rows are mixed."
    )
    transforms: Annotated[list[Path], Role.INPUT] = Field(
        default_factory=list,
        description="Python files that register the transforms which datasets name.",
    )
    on_error: OnError = Field(
        "fail",
        description="What a bad row does. fail: end the run; skip: be left out; quarantine: be "
        "left out and copied to RUN/rejects.jsonl.",
    )
    deduplicate: bool | Literal["near"] = Field(
        False,
        description="Leave out rows that stand twice. exact (or true): one that equals an earlier "
        "row in its tokens, or in mix and split, which have no tokens, in its JSON. near: also one "
        "that says nearly the same, by MinHash over 5 words in a row; the sources are read twice.",
    )
    near_similarity: Annotated[float, Field(gt=0, le=1), ADDED_LATER] = Field(
        0.8,
        description="With deduplicate: near, the estimated share of word sequences (Jaccard "
        "similarity) from which on two rows are nearly the same. Below 0.7 not all are found.",
    )
    decontaminate: Annotated[DecontaminateConfig | None, ADDED_LATER] = Field(
        None,
        description="Leave out rows that share so many words in a row with a benchmark. By default "
        "nothing is compared.",
    )
    debug_subsample: PositiveInt | None = Field(
        None, description="For trials: only the first so many rows of each dataset."
    )
    function_limits: Annotated[FunctionLimits, Role.PLACEMENT] = Field(
        FunctionLimits(),
        description="Limits for the transforms, and for the functions of the stage rewards.",
    )
    hub_dir: Annotated[Path | None, Role.PLACEMENT] = Field(
        None, description="Folder where `post-training data fetch` put the hub datasets."
    )
    num_workers: Annotated[PositiveInt | None, Role.PLACEMENT] = Field(
        None,
        description="Processes that read and encode rows. By default one a core, at most 16. The "
        "result is the same for any number.",
    )

    @field_validator("deduplicate", mode="before")
    @classmethod
    def _exact(cls, value: object) -> object:
        # What it was called first, so that configurations of then are what they were.
        return True if value == "exact" else value

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> "SourcesConfig":
        weighed = [dataset.weight is not None for dataset in self.datasets]
        if any(weighed) and not all(weighed):
            raise ValueError("datasets: give each a weight, or none")
        return self

    def require_datasets(self) -> None:
        """Errors: ValueError, as told of the stage's whole configuration, when there are none."""
        if not self.datasets:
            raise ValueError("data.datasets: name at least one")

    def require_whole_datasets(self, advice: str) -> None:
        """Errors: ValueError when there are none, or one whose rows are chosen. advice: what to do
        instead."""
        self.require_datasets()
        for index, dataset in enumerate(self.datasets):
            for key in _CHOOSE_ROWS:
                if getattr(dataset, key) is not None:
                    raise ValueError(f"data.datasets[{index}].{key}: {advice}")


class DataConfig(SourcesConfig):
    """What is trained on: datasets with their chat template, or data that is already tokenised."""

    chat_template: Annotated[ChatTemplate | None, INPUT_IF_PATH] = Field(
        None,
        description=f"{_TEMPLATE} It belongs to datasets: data that is already tokenised needs "
        "none.",
    )
    template_date: Annotated[date | None, ADDED_LATER] = Field(None, description=_TEMPLATE_DATE)
    history_thoughts: Annotated[HistoryThoughts, ADDED_LATER] = Field(
        "as_template", description=_HISTORY_THOUGHTS
    )
    prepared: Annotated[Path | None, Role.INPUT] = Field(
        None, description="Instead of datasets: a dataset that `entrypoint prepare` wrote."
    )
    indexed: Annotated[list[Path], Role.INPUT] = Field(
        default_factory=list,
        description="Instead of datasets: prefixes PREFIX of the files "
        "PREFIX_text_document.{bin,idx} and PREFIX_kinds_document.{bin,idx} that "
        "`entrypoint tokenize` wrote.",
    )
    special_tokens: SpecialTokens = Field(
        SpecialTokens(),
        description="Special tokens, where they should differ from the tokenizer's.",
    )
    train_on: Literal["all_turns", "last_turn"] = Field(
        "all_turns",
        description="Which turns of the assistant are trained on, in rows that do not say it "
        "themselves.",
    )
    train_on_thoughts: bool = Field(
        True, description="Whether the assistant's thoughts are trained on too."
    )
    control_tokens: ControlTokens = Field("refuse", description=_CONTROL_TOKENS)
    without_kinds: Literal["refuse", "train_all"] = Field(
        "refuse",
        description="What to do with indexed files without PREFIX_kinds_document, which says which "
        "tokens are trained on: refuse them, or train on all tokens.",
    )
    debug_oom: bool = Field(
        False,
        description="For trials: the longest rows come first, so that a run that needs too much "
        "memory fails at once.",
    )
    cache_dir: Annotated[Path | None, Role.PLACEMENT] = Field(
        None,
        description="Folder where prepared data is kept and found again by later runs with the "
        "same data settings and inputs.",
    )

    @field_validator("indexed")
    @classmethod
    def _prefixes(cls, paths: list[Path]) -> list[Path]:
        # GPT-NeoX's settings name them with this ending.
        return [path.with_name(path.name.removesuffix("_text_document")) for path in paths]

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "DataConfig":
        given = [key for key in ("datasets", "prepared", "indexed") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError("set exactly one of datasets, prepared, indexed")
        if given != ["datasets"] and (self.deduplicate == "near" or self.decontaminate):
            raise ValueError(
                "deduplicate: near, and decontaminate, need datasets: tokens are no text"
            )
        if (given == ["datasets"]) != (self.chat_template is not None):
            raise ValueError("set chat_template with datasets, and only with them")
        if given != ["datasets"] and self.transforms:
            raise ValueError("set transforms with datasets, and only with them")
        if given == ["indexed"] and (unused := not_default(self, _FOR_TEXTS)):
            raise ValueError(
                f"set {unused[0]} with datasets: indexed files say themselves what is trained"
            )
        return self


class TemplatedDataConfig(SourcesConfig):
    """What is annotated, and how a model reads it."""

    chat_template: Annotated[ChatTemplate, INPUT_IF_PATH] = Field(
        description=f"{_TEMPLATE} It must be the one that the model is trained with."
    )
    template_date: Annotated[date | None, ADDED_LATER] = Field(None, description=_TEMPLATE_DATE)
    history_thoughts: Annotated[HistoryThoughts, ADDED_LATER] = Field(
        "as_template", description=_HISTORY_THOUGHTS
    )
    special_tokens: SpecialTokens = Field(
        SpecialTokens(),
        description="Special tokens, where they should differ from the tokenizer's.",
    )
    control_tokens: ControlTokens = Field("refuse", description=_CONTROL_TOKENS)


class SequenceConfig(Config):
    """How conversations and texts become the rows of supervised fine-tuning."""

    max_seq_length: PositiveInt = Field(description="Length of a row, in tokens.")
    overlong: Literal["truncate", "split", "drop", "fail"] = Field(
        "truncate",
        description="What becomes of a longer sequence. truncate: its end is cut off; split: it "
        "becomes several; drop: it is a bad row; fail: the run ends.",
    )
    packing: Packing = Field("none", description=_PACKING)


class PairConfig(Config):
    """How preference rows become pairs of token sequences, a chosen and a rejected answer."""

    max_prompt_length: PositiveInt | None = Field(
        None,
        description="Tokens of a prompt, at most: of what both answers have in common. A longer "
        "one is cut. By default there is no limit.",
    )
    max_completion_length: PositiveInt | None = Field(
        None,
        description="Tokens of an answer, at most. By default there is no limit.",
    )
    keep_prompt: Literal["start", "end"] = Field(
        "end", description="Which end of a prompt that is too long is kept."
    )
    truncated_completions: Literal["drop", "train"] = Field(
        "drop",
        description="A pair with an answer that is cut here, or was cut when it was generated "
        "(chosen_is_truncated): drop it as bad, or train on the answer as far as it goes.",
    )
    num_ref_rewards: PositiveInt | None = Field(
        None,
        description="Compute quantiles from the first so many ref_rewards of a row. By default the "
        "row's own quantile rewards are used, or else all of its ref_rewards.",
    )
    packing: Packing = Field("none", description="As sft.packing, with whole pairs.")
    max_seq_length: PositiveInt | None = Field(
        None, description="Length of a packed row, in tokens. Only packing needs it."
    )
    share_prompt: Annotated[bool, Role.TOPOLOGY] = Field(
        False,
        description="The prompt of a pair is in its row once, and both answers see it by a mask, "
        "instead of once for each answer.",
    )

    @model_validator(mode="after")
    def _length_of_packed_rows(self) -> "PairConfig":
        if (self.packing == "none") != (self.max_seq_length is None):
            raise ValueError("set max_seq_length with packing, and only with it")
        return self


def format_of_columns(columns: dict[str, str], name: str | None = None) -> str:
    """The format that has all these columns, and whose needed ones are all there.

    Errors: ValueError when none fits, or the named one does not.
    """
    fitting = [
        known
        for known, (needed, optional) in FORMATS.items()
        if set(needed) <= set(columns) <= {*needed, *optional} and name in (None, known)
    ]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{key}: {', '.join(needed)}" for key, (needed, _) in FORMATS.items())
    what = f"columns: {', '.join(columns)} don't make up "
    raise ValueError(what + (f"format {name}" if name else f"one format ({known})"))
