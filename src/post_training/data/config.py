"""The `data`, `sft` and `dpo` blocks of a configuration: what is read, and how it becomes rows."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from post_training.config.model import ADDED_LATER, Config, Role

# The formats, and the columns that each is made of; those in brackets may be missing.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("input", "system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "tools")),
    "text": (("text",), ()),
    "preference": (("chosen", "rejected"), ("prompt", "system", "tools")),
    "swissai": (("initial_prompt", "conversation_branches"), ()),
    # For annotation; only where the settings say so, since in training an answer is missing.
    "prompt": (("prompt",), ("input", "system", "tools")),
}
TEMPLATES = ("chatml", "tulu", "zephyr", "mistral", "llama-3", "apertus", "plain")


class MessageFields(Config):
    """What a message's fields are called. By default role and content, or from and value."""

    role: str | None = None
    content: str | None = None
    weight: str | None = None


class DatasetConfig(Config):
    """One source of rows: a file or saved dataset folder (`path`), or a hub dataset (`hub`).

    path: .jsonl (or .ndjson), .json, .parquet, or a folder that `datasets` saved.
    revision: the hub dataset's commit; `post-training data fetch` says it and fills the cache.
    format, columns: a format of FORMATS and {its column: the file's}; else both are recognised.
    message_fields, roles: names inside a message; roles is {the file's: ours}.
    ignore: columns (`label`) and message fields (`messages[].name`) that are not to be read, though
    they would change what is said or trained; a row that fills one is refused otherwise.
    transform: a registered function that each row goes through first.
    subsample_factor: a share of the rows (0.5), or their number (500). duplication_factor: how
    often each row is used (2.5: half of them a third time). max_rows, max_tokens: caps, after
    those. weight: this dataset's share of the mixture's rows, relative to the others'.
    """

    name: str | None = None
    path: Annotated[Path | None, Role.INPUT] = None
    hub: str | None = None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    subset: str | None = None
    split: str | None = None
    format: Literal[tuple(FORMATS)] | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    message_fields: MessageFields = MessageFields()
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] = Field(
        default_factory=dict
    )
    ignore: Annotated[list[str], ADDED_LATER] = Field(default_factory=list)
    transform: str | None = None
    subsample_factor: PositiveFloat | PositiveInt | None = None
    duplication_factor: PositiveFloat | None = None
    max_rows: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    weight: PositiveFloat | None = None

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
    """The tokenizer's special tokens, where they should be others than it says itself."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None


class FunctionLimits(Config):
    """Of functions from files of the user's, transforms and rewards; what goes beyond ends the run.

    timeout_s: of one call, and of loading the files. max_result_bytes: of what a call returns.
    max_printed_bytes: of what one process prints; the rest is left out.
    """

    timeout_s: PositiveFloat = 120.0
    max_result_bytes: PositiveInt = 64 << 20
    max_printed_bytes: PositiveInt = 1 << 20


class SourcesConfig(Config):
    """The datasets, and what becomes of their bad rows.

    transforms: Python files that register the transforms which the datasets name.
    on_error: of a bad row: stop; leave it out; or also copy it to RUN/rejects.jsonl.
    deduplicate: leave out a row that equals an earlier one: in its tokens, or (mix, split) in its
    JSON. debug_subsample: use only the first rows of each dataset.
    function_limits: of the transforms, and of the functions that `rewards` names.
    hub_dir: where `post-training data fetch` put the hub datasets.
    num_workers: processes; by default one for each core, at most 16.
    """

    datasets: list[DatasetConfig] = Field(default_factory=list)
    transforms: Annotated[list[Path], Role.INPUT] = Field(default_factory=list)
    on_error: Literal["fail", "skip", "quarantine"] = "fail"
    deduplicate: bool = False
    debug_subsample: PositiveInt | None = None
    function_limits: Annotated[FunctionLimits, Role.PLACEMENT] = FunctionLimits()
    hub_dir: Annotated[Path | None, Role.PLACEMENT] = None
    num_workers: Annotated[PositiveInt | None, Role.PLACEMENT] = None

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> "SourcesConfig":
        weighed = [dataset.weight is not None for dataset in self.datasets]
        if any(weighed) and not all(weighed):
            raise ValueError("datasets: give each a weight, or none")
        return self


class DataConfig(SourcesConfig):
    """Either `datasets` with their `chat_template`, or `prepared`: a dataset that `entrypoint
    prepare` made, or `indexed`: a PREFIX of each PREFIX_text_document.{bin,idx}, with
    PREFIX_kinds_document beside it, that `entrypoint tokenize` made.

    chat_template: one of ours (data/chat/jinja), or `model`: the tokenizer's own.
    train_on: the assistant's turns that are learned, of rows that don't say it themselves.
    control_tokens: a row whose content holds a special token is bad, or the token is kept as such.
    without_kinds: what to do with .bin/.idx that have no kinds of their tokens beside them.
    debug_oom: the longest rows first.
    cache_dir: prepared data is kept there, and found again by whatever has the same identity.
    """

    chat_template: Literal[(*TEMPLATES, "model")] | None = None
    prepared: Annotated[Path | None, Role.INPUT] = None
    indexed: Annotated[list[Path], Role.INPUT] = Field(default_factory=list)
    special_tokens: SpecialTokens = SpecialTokens()
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    train_on_thoughts: bool = True
    control_tokens: Literal["refuse", "keep"] = "refuse"
    without_kinds: Literal["refuse", "train_all"] = "refuse"
    debug_oom: bool = False
    cache_dir: Annotated[Path | None, Role.PLACEMENT] = None

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
        if (given == ["datasets"]) != (self.chat_template is not None):
            raise ValueError("set chat_template with datasets, and only with them")
        return self


class SequenceConfig(Config):
    """max_seq_length: of a row, in tokens. overlong: what becomes of a longer sequence; its end
    is cut off, it is cut into several, left out, or an error.

    packing: several sequences share a row, each seeing only itself. bfd: best-fit decreasing over
    the whole dataset. k_bin_packed: best fit among 16 open rows, in the order of the data.
    next_fit: only the last row is open.
    """

    max_seq_length: PositiveInt
    overlong: Literal["truncate", "split", "drop", "fail"] = "truncate"
    packing: Literal["none", "bfd", "k_bin_packed", "next_fit"] = "none"


class PairConfig(Config):
    """How preference rows become pairs of token sequences.

    max_prompt_length, max_completion_length: in tokens, of what both answers have in common and of
    each answer. Of a longer prompt keep_prompt says which end stays. truncated_completions: a pair
    with an answer that is cut here, or was when it was generated (chosen_is_truncated), is left
    out, or trained on as it is. num_ref_rewards: quantiles are taken over so many of ref_rewards,
    the first; by default the dataset's own quantile rewards, or else over all of them.

    packing: whole pairs share a row of max_seq_length tokens, as in SequenceConfig. share_prompt:
    a pair's prompt is in its row once, and both answers see it, by a mask.
    """

    max_prompt_length: PositiveInt | None = None
    max_completion_length: PositiveInt | None = None
    keep_prompt: Literal["start", "end"] = "end"
    truncated_completions: Literal["drop", "train"] = "drop"
    num_ref_rewards: PositiveInt | None = None
    packing: Literal["none", "bfd", "k_bin_packed", "next_fit"] = "none"
    max_seq_length: PositiveInt | None = None
    share_prompt: Annotated[bool, Role.TOPOLOGY] = False

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
