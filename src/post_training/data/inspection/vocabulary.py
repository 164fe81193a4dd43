"""What each token id spells.

Byte-level BPE has a character for each byte of a piece. SentencePiece, and what is made of it, has
▁ for a space and pieces <0x00> to <0xFF> for single bytes. Pieces of others are shown as they are.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from post_training.core.errors import UsageError
from post_training.data.control.span_tokenizers import Piece, read_model, read_tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


@dataclass(frozen=True)
class Spelled:
    """content: in UTF-8, though a token may end within a character. is_special: a token that no
    text is made of (a control token, a marker of the template)."""

    id: int
    content: bytes
    is_special: bool


class Vocabulary:
    """piece_of: of an id, None where there is none. whole: ids that stand for themselves, and not
    for the bytes that `spell` makes of a piece: {id: (text, is_special)}."""

    def __init__(
        self,
        piece_of: Callable[[int], str | None],
        spell: Callable[[str], bytes],
        whole: Mapping[int, tuple[str, bool]],
    ):
        self._piece_of = piece_of
        self._spell = spell
        self._known = {
            token: Spelled(token, text.encode(), is_special)
            for token, (text, is_special) in whole.items()
        }

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """path: a SentencePiece model, or a folder with a tokenizer.json.

        Errors: PostTrainingError for anything else.
        """
        if not path.is_dir():
            return cls._of_sentencepiece(path)
        return cls.of_tokenizer(read_tokenizer(path))

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> "Vocabulary":
        decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": "none"}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        spell = _as_it_is
        if any(step["type"] == "ByteLevel" for step in steps):
            spell = _byte_level()
        elif any(_restores_spaces(step) for step in steps):
            spell = _sentencepiece
        whole = {
            token: (added.content, added.special)
            for token, added in tokenizer.get_added_tokens_decoder().items()
        }
        return cls(tokenizer.id_to_token, spell, whole)

    @classmethod
    def _of_sentencepiece(cls, path: Path) -> "Vocabulary":
        pieces = read_model(path).pieces
        # A marker of the seeds' documents is a user-defined piece, and so is, often, a line break.
        whole = {
            token: (piece.piece, True)
            for token, piece in enumerate(pieces)
            if piece.type in (Piece.CONTROL, Piece.UNKNOWN)
            or (piece.type == Piece.USER_DEFINED and piece.piece.strip(f" \t\r\n{_SPACE}"))
        }
        return cls(
            lambda token: pieces[token].piece if token < len(pieces) else None,
            _sentencepiece,
            whole,
        )

    def spell(self, ids: Iterable[int]) -> tuple[Spelled, ...]:
        """Errors: UsageError for an id that is not in the vocabulary."""
        return tuple(self._known.get(token) or self._learn(token) for token in ids)

    def _learn(self, token: int) -> Spelled:
        piece = self._piece_of(token) if token >= 0 else None
        if piece is None:
            raise UsageError(
                f"token {token} is not in the tokenizer's vocabulary",
                hint="the data was made with another tokenizer",
            )
        spelled = self._known[token] = Spelled(token, self._spell(piece), False)
        return spelled


def _restores_spaces(step: dict) -> bool:
    return step["type"] in ("Metaspace", "ByteFallback") or (
        step["type"] == "Replace" and step["pattern"] == {"String": _SPACE}
    )


def _as_it_is(piece: str) -> bytes:
    return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace(_SPACE, " ").encode()


def _byte_level() -> Callable[[str], bytes]:
    """A printable byte is its own character; the others have those from 256 on, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(own.values()))
    byte_of = own | dict(zip(alphabet[len(own) :], others, strict=True))

    def spell(piece: str) -> bytes:
        if byte_of.keys() >= set(piece):
            return bytes(byte_of[character] for character in piece)
        return piece.encode()  # put into the vocabulary by hand

    return spell
