"""Pairs as a reward model reads them: whole conversations, by its own tokenizer and template."""

from dataclasses import dataclass
from typing import Any, ClassVar

from post_training.data.reading import Reader
from post_training.data.rows import Row
from post_training.data.sources import Source
from post_training.stages.pair_data import PairPreparation


@dataclass(frozen=True)
class TextReader(Reader):
    """Without the token ids that were sampled: they may be another tokenizer's, and when the model
    judges, there is only the text."""

    def parse(self, value: dict[str, Any], dataset: int) -> list[Row]:
        texts = {name: cell for name, cell in value.items() if not name.endswith("_token_ids")}
        return super().parse(texts, dataset)


@dataclass(frozen=True)
class TextPairPreparation(PairPreparation):
    limits_key: ClassVar[str] = "pairs"

    def _sources(self) -> tuple[list[Source], Reader]:
        sources, reader = super()._sources()
        own = TextReader(reader.config, reader.formats, reader.train_on, reader.train_on_thoughts)
        return sources, own
