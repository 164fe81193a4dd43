"""What ends a sample, and what of it is text."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig

from post_training.data.tokenize import Encoder
from post_training.models.load import read_model_settings


@dataclass(frozen=True)
class Endings:
    """ids: a token that ends a sample. texts: a text that does, as soon as it is there."""

    ids: frozenset[int]
    texts: tuple[str, ...]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: Path, encoder: Encoder, texts: list[str]) -> "Endings":
        """The ids: those that the model's folder names, the tokenizer's eos, and the template's
        end of a turn, where it is one token."""
        if (model / "generation_config.json").exists():
            named = GenerationConfig.from_pretrained(model, local_files_only=True).eos_token_id
        else:
            named = read_model_settings(model).get("eos_token_id")
        ids = {named} if isinstance(named, int) else set(named or ())
        if encoder.eos_id is not None:
            ids.add(encoder.eos_id)
        mark = encoder.backend.encode(encoder.template.end_of_turn, add_special_tokens=False).ids
        if len(mark) == 1:
            ids.add(mark[0])
        return cls(frozenset(ids), tuple(texts), encoder.backend)

    def text(self, ids: list[int]) -> str:
        """Of a sample's tokens: without the end of the turn, special tokens and the stop text."""
        if ids[-1] in self.ids:
            ids = ids[:-1]
        cut = self.cut(ids)
        return self._decode(ids) if cut is None else cut

    def cut(self, ids: list[int]) -> str | None:
        """What stands before the first stop text; None when there is none."""
        text = self._decode(ids)
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
