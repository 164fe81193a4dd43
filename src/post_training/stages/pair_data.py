"""The prepared pairs that a run reads: given, found in the cache or made (prepared_data.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from post_training.data.chat.templates import ChatTemplate
from post_training.data.config import DatasetConfig, PairConfig
from post_training.data.pairs.dataset import SCHEMA, PairDataset
from post_training.data.pairs.encode import PairEncoder
from post_training.data.pairs.prepare import VERSION, described, prepare_pairs
from post_training.models.load import read_model_settings
from post_training.models.reference import Reference
from post_training.stages.prepared_data import DataPreparation
from post_training.stages.progress import Progress


@dataclass(frozen=True)
class PairPreparation(DataPreparation):
    """num_ids: ids in the data must be below it; by default the tokenizer's tokens."""

    limits: PairConfig
    num_ids: int | None = None

    limits_key: ClassVar[str] = "dpo"
    schema: ClassVar[str] = SCHEMA

    def open(self, folder: Path) -> PairDataset:
        return PairDataset.open(folder)

    def described(self, record: dict[str, Any]) -> Iterator[str]:
        return described(record)

    def _identity(self) -> tuple[ChatTemplate | None, dict[str, Any]]:
        template, identity = super()._identity()
        references = [_reference(dataset) for dataset in self.data.datasets]
        own = {"pairs_version": VERSION, "num_ids": self._num_ids, "references": references}
        return template, {**identity, **own}

    @property
    def _num_ids(self) -> int:
        return self.num_ids or len(self.tokenizer)

    def _prepare(
        self, folder: Path, template: ChatTemplate, identity: dict[str, Any]
    ) -> dict[str, Any]:
        sources, reader = self._sources()
        encoder = PairEncoder(reader, self._encoder(template), self.limits, self._num_ids)
        with Progress("row", None, shown=True) as progress:
            return prepare_pairs(
                folder,
                encoder,
                sources,
                seed=self.seed,
                identity=identity,
                rejects_path=self._rejects_path,
                on_progress=lambda rows, tokens: progress.update(rows, f"{tokens:,} tokens"),
                check_inputs=self.context.inputs.check,
            )


def num_embedded_ids(folder: Path) -> int | None:
    """Of a model folder: its samples may hold ids that are no token of its tokenizer. None where
    there is a tokenizer alone."""
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
