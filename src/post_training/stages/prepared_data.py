"""The prepared data that a run reads (sequences or pairs): given, found in the cache, or made now.

    data.prepared   is read where it is, if it was made with the same tokenizer and limits
    data.cache_dir  holds a folder for each identity; RUN/data is a link to it
    else            RUN/data is made

The identity is of what the bytes come from: settings, inputs, tokenizer, template, and the VERSION
of the code. Jobs that want the same folder wait for one another; a killed one leaves none.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.config.model import Role, changed_settings, settings_by_role
from post_training.core.errors import UsageError
from post_training.core.hashing import sha256_text, sha256_value
from post_training.core.locks import locked
from post_training.data.chat.templates import (
    ChatTemplate,
    choose_template,
    difference_from_own,
    misfit,
)
from post_training.data.cleaning.cleaning import with_cleaning
from post_training.data.config import DataConfig, DatasetConfig, PairConfig, SequenceConfig
from post_training.data.formats.columns import TOKEN_IDS
from post_training.data.pairs.dataset import PAIRS_SCHEMA, PairDataset, describe_pairs
from post_training.data.pairs.prepare import PAIRS_VERSION, PairEncoder, prepare_pairs
from post_training.data.prepared.dataset import (
    SCHEMA,
    PreparedDataset,
    check_files,
    describe_prepared,
)
from post_training.data.prepared.prepare import (
    VERSION,
    ChunkEncoder,
    open_stores,
    prepare,
    prepare_indexed,
)
from post_training.data.reading import Reader, name_of, open_sources
from post_training.data.rows import Row
from post_training.data.sources import Source
from post_training.data.tokenize import Encoder
from post_training.models.load import read_model_settings
from post_training.models.reference import Reference, tokenizer_fingerprint
from post_training.stages.context import Progress, StageContext


@dataclass(frozen=True)
class DataPreparation:
    """Finds or makes the prepared dataset of one block of settings.

    limits: the `sft` block. tokenizer: with the special tokens that the settings ask for. name: of
    the folder in RUN, and of the block: data or evaluation.
    """

    context: StageContext
    data: DataConfig
    limits: SequenceConfig
    tokenizer: PreTrainedTokenizerBase
    seed: int
    name: str = "data"

    limits_key: ClassVar[str] = "sft"  # of `limits` in a configuration
    schema: ClassVar[str] = SCHEMA  # of prepared.json

    def open_or_prepare(self) -> PreparedDataset:
        """What to train on; every rank calls this, and rank 0 alone prepares.

        Errors: those of the data; UsageError when prepared data was made otherwise.
        """
        if self.data.prepared is not None:
            dataset = self.open(self.data.prepared)
            self._check_fits(dataset.record)
            return dataset
        folder = self.context.run_dir / self.name
        self.context.on_writer(lambda: self._prepare_or_link(folder))
        return self.open(folder)

    def open(self, folder: Path) -> PreparedDataset:
        """The dataset in a prepared folder."""
        return PreparedDataset.open(folder, open_stores(self.data))

    def prepare_in(self, folder: Path) -> dict[str, Any]:
        """Prepare the data in `folder`, unless an earlier attempt did; its record."""
        if self._is_prepared(folder):
            return self.open(folder).record
        return self._write(folder, *self._identity())

    def _is_prepared(self, folder: Path) -> bool:
        """Errors: UsageError where its files were changed since."""
        if not folder.exists():
            return False
        # It is complete: a folder is renamed to its place when all is written.
        check_files(folder, self.schema)
        return True

    def _prepare_or_link(self, folder: Path) -> None:
        """Prepare `folder`, or link it to the cache's; it may be there from an earlier attempt."""
        if self._is_prepared(folder):
            return
        template, identity = self._identity()
        if self.data.cache_dir is None:
            self._write(folder, template, identity)
            return
        cached = self.data.cache_dir.absolute() / sha256_value(identity)
        lock = cached.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        said = f"data: waiting for the job that prepares the same data ({lock})"
        with locked(lock, lambda: self.context.log(said)):
            if self._is_prepared(cached):
                self.context.log(f"{self.name}: found in the cache: {cached}")
            else:
                self._write(cached, template, identity)
        folder.unlink(missing_ok=True)  # A link into a cache that was cleared does not "exist".
        folder.symlink_to(cached)

    def _identity(self) -> tuple[ChatTemplate | None, dict[str, Any]]:
        """The template, and what decides the bytes; the libraries' versions are the image's."""
        inputs, own = self.context.input_fingerprints, f"{self.name}."
        template = None
        if self.data.chat_template is not None:
            template = choose_template(
                self.data.chat_template,
                self.tokenizer,
                train_on_thoughts=self.data.train_on_thoughts,
                today=self.data.template_date,
                history=self.data.history_thoughts,
            )
            if self.name == "data":  # Rows to evaluate on are written by the same template.
                self._say_how(template)
        return template, {
            "version": VERSION,
            "data": settings_by_role(self.data)[Role.RECIPE],
            self.limits_key: self.limits.model_dump(mode="json"),
            "inputs": {key: inputs[key] for key in sorted(inputs) if key.startswith(own)},
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "template": template and sha256_text(template.text),
            "seed": self.seed,
        }

    def _say_how(self, template: ChatTemplate) -> None:
        if difference := difference_from_own(template, self.tokenizer):
            self.context.log(f"warning: {difference}; the saved model gets {template.name!r}")
        if problem := misfit(template, self.tokenizer):
            self.context.log(f"warning: {problem}")
        for line in template.describe():
            self.context.log(f"{self.name}: {line}")

    def _write(
        self, folder: Path, template: ChatTemplate | None, identity: dict[str, Any]
    ) -> dict[str, Any]:
        """Prepare the data in `folder` and say what came of it; the record."""
        log, started_at = self.context.log, time.monotonic()
        if template is None:
            record = prepare_indexed(
                folder,
                self.data,
                self.limits,
                seed=self.seed,
                vocab_size=len(self.tokenizer),
                identity=identity,
                rejects_path=self._rejects_path,
                check_inputs=self.context.inputs.check,
            )
        else:
            record = self._write_sources(folder, template, identity)
        for line in self.describe(record):
            log(f"{self.name}: {line}")
        log(f"{self.name}: prepared in {time.monotonic() - started_at:.1f} s")
        # What is read from here on is the folder alone; .bin and .idx are read where they lie.
        released = ("datasets", "transforms", "decontaminate")
        self.context.inputs.release(*(f"{self.name}.{key}" for key in released))
        return record

    def describe(self, record: dict[str, Any]) -> Iterator[str]:
        """The record of a dataset in a few lines for a person."""
        return describe_prepared(record)

    def _write_sources(
        self, folder: Path, template: ChatTemplate, identity: dict[str, Any]
    ) -> dict[str, Any]:
        sources, reader = self._sources()
        reader = with_cleaning(reader, sources, self.context.run_dir, self.context.log)
        control_tokens = self.data.control_tokens
        encoder = Encoder.create(self.tokenizer, template, control_tokens=control_tokens)
        with Progress("row", None, shown=True) as progress:
            return self._prepare(
                folder,
                reader,
                encoder,
                sources,
                seed=self.seed,
                identity=identity,
                rejects_path=self._rejects_path,
                on_progress=lambda rows, tokens: progress.update(rows, f"{tokens:,} tokens"),
                check_inputs=self.context.inputs.check,
            )

    def _sources(self) -> tuple[list[Source], Reader]:
        data = self.data
        sources, formats = open_sources(data)
        for dataset, found in zip(data.datasets, formats, strict=True):
            self.context.log(f"{self.name}: {name_of(dataset)} is read as {found.describe()}")
        return sources, Reader(data, formats, data.train_on, data.train_on_thoughts)

    def _prepare(
        self,
        folder: Path,
        reader: Reader,
        encoder: Encoder,
        sources: list[Source],
        **settings: Any,
    ) -> dict[str, Any]:
        state = ChunkEncoder(reader, encoder, self.limits, len(self.tokenizer))
        return prepare(folder, state, sources, **settings)

    @property
    def _rejects_path(self) -> Path:
        prefix = "" if self.name == "data" else f"{self.name}_"
        return self.context.run_dir / f"{prefix}rejects.jsonl"

    def _check_fits(self, record: dict[str, Any]) -> None:
        where, made_with = str(self.data.prepared), record["identity"]
        if made_with["tokenizer"] != tokenizer_fingerprint(self.tokenizer):
            raise UsageError(
                "the data was prepared with another tokenizer than the model's", where=where
            )
        key, limits = self.limits_key, self.limits.model_dump(mode="json")
        changed = [f"{key}.{each}" for each in changed_settings(made_with[key], limits)]
        changed += [f"data.{each}" for each in self._changed_in_data(made_with["data"])]
        if changed:
            problem = f"the data was prepared with other settings: {'; '.join(changed)}"
            raise UsageError(problem, where=where)

    def _changed_in_data(self, made_with: dict[str, Any]) -> list[str]:
        """The settings of `data` that are set, and that the data was prepared without. One that is
        left at its default asks for nothing."""
        own = settings_by_role(self.data)[Role.RECIPE]
        default = settings_by_role(DataConfig(prepared=self.data.prepared))[Role.RECIPE]
        asked = {
            key: value
            for key, value in own.items()
            # The tokenizer is compared as a whole; debug_oom is for the training too.
            if value != default.get(key) and key != "debug_oom" and "special_tokens" not in key
        }
        return changed_settings({key: made_with.get(key, default.get(key)) for key in asked}, asked)


@dataclass(frozen=True)
class PairPreparation(DataPreparation):
    """The same for pairs. limits: the `dpo` block. num_ids: ids in the data must be below it; by
    default the number of the tokenizer's tokens."""

    limits: PairConfig
    num_ids: int | None = None

    limits_key: ClassVar[str] = "dpo"
    schema: ClassVar[str] = PAIRS_SCHEMA

    def open(self, folder: Path) -> PairDataset:
        return PairDataset.open(folder)

    def describe(self, record: dict[str, Any]) -> Iterator[str]:
        return describe_pairs(record)

    def _identity(self) -> tuple[ChatTemplate | None, dict[str, Any]]:
        template, identity = super()._identity()
        references = [_reference(dataset) for dataset in self.data.datasets]
        own = {"pairs_version": PAIRS_VERSION, "num_ids": self._num_ids, "references": references}
        return template, {**identity, **own}

    @property
    def _num_ids(self) -> int:
        return self.num_ids or len(self.tokenizer)

    def _prepare(
        self,
        folder: Path,
        reader: Reader,
        encoder: Encoder,
        sources: list[Source],
        **settings: Any,
    ) -> dict[str, Any]:
        state = PairEncoder(reader, encoder, self.limits, self._num_ids)
        return prepare_pairs(folder, state, sources, **settings)


@dataclass(frozen=True)
class TextPairPreparation(PairPreparation):
    """Pairs as a reward model reads them: whole conversations, by its own tokenizer and template.

    limits: the `pairs` block.
    """

    limits_key: ClassVar[str] = "pairs"

    def _sources(self) -> tuple[list[Source], Reader]:
        sources, reader = super()._sources()
        # So that the report says of the token ids what is so: they are not read.
        formats = tuple(replace(each, figures=each.figures - TOKEN_IDS) for each in reader.formats)
        return sources, TextReader(
            reader.config, formats, reader.train_on, reader.train_on_thoughts
        )


@dataclass(frozen=True)
class TextReader(Reader):
    """Without the token ids that were sampled: they may be another tokenizer's, and when the model
    judges, there is only the text."""

    def parse(self, value: dict[str, Any], dataset: int) -> list[Row]:
        texts = {name: cell for name, cell in value.items() if name not in TOKEN_IDS}
        return super().parse(texts, dataset)


def num_embedded_ids(folder: Path) -> int | None:
    """How many ids a model folder has embeddings of; None where there is a tokenizer alone.

    They may be more than the tokenizer has tokens, and the model's own samples may hold them.
    """
    if not (folder / "config.json").exists():
        return None
    settings = read_model_settings(folder)
    return settings.get("text_config", settings).get("vocab_size")


def _reference(dataset: DatasetConfig) -> dict[str, str] | None:
    """What made the logprobs of a dataset: the reference.json beside its rows."""
    if dataset.path is None:
        return None
    reference = Reference.read(dataset.path if dataset.path.is_dir() else dataset.path.parent)
    return None if reference is None else reference.as_record()
