"""What each token id spells (Vocabulary), and its bytes as a person can read them (Stretch).

Byte-level BPE has a character for each byte of a piece. SentencePiece, and what is made of it, has
▁ for a space and pieces <0x00> to <0xFF> for single bytes. Pieces of others are shown as they are.

Nothing that is shown is invisible, and nothing steers a terminal:

    ↵ line break   ⇥ tab   · space   ⟨e2 96⟩ bytes of a part of a character   ⟨U+200B⟩ invisible

A single space between words is left as it is, unless every space is asked for.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, pre_tokenizers

from post_training.core.errors import UsageError
from post_training.data.control.documents import Piece, read_model, read_tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": "·"}
# Control and format characters, unassigned ones, and spaces that look like another or like none.
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs"}
# Joiners are part of how emoji and several scripts are written.
_JOINERS = ("\u200c", "\u200d")
# Bytes that are no UTF-8 (as surrogateescape has them), and characters that may need a mark.
_BYTES, _UNUSUAL = "[\udc80-\udcff]+", "[^ -~]"
_UNUSUAL_OR_ANY_SPACE = re.compile(f"{_BYTES}|{_UNUSUAL}| ")
_UNUSUAL_OR_ODD_SPACE = re.compile(rf"{_BYTES}|{_UNUSUAL}|(?<!\S) | (?!\S)")


@dataclass(frozen=True)
class Spelled:
    """What an id spells.

    content: in UTF-8, though a token may end within a character. is_special: no text is made of it
    (a control token, a marker of the template).
    """

    id: int
    content: bytes
    is_special: bool


class Vocabulary:
    """What each id of a tokenizer spells.

    piece_of: of an id, None where there is none. whole: ids that stand for themselves, and not
    for the bytes that `spell` makes of a piece: {id: (text, is_special)}.
    """

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
        # A marker of documents (control/documents.py) is a user-defined piece. So is, often, a line
        # break, but that is no special token.
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
        return piece.encode()  # a piece that was put into the vocabulary by hand

    return spell


@dataclass(frozen=True)
class Stretch:
    """A stretch of shown text of one style: plain text, a mark of ours, or a special token."""

    text: str
    style: Literal["plain", "mark", "special"] = "plain"


def stretches_of_run(tokens: Sequence[Spelled]) -> Iterator[Stretch]:
    """Tokens as one text, so that characters of several tokens are whole. A line break is its mark
    and itself."""
    content = b""
    for token in tokens:
        if token.is_special:
            yield from _stretches(content, _UNUSUAL_OR_ODD_SPACE)
            content = b""
            yield _special(token)
        else:
            content += token.content
    yield from _stretches(content, _UNUSUAL_OR_ODD_SPACE)


def stretches_of_token(token: Spelled) -> Iterator[Stretch]:
    """One token, every space of it visible; a line break is its mark alone."""
    if token.is_special:
        yield _special(token)
        return
    for stretch in _stretches(token.content, _UNUSUAL_OR_ANY_SPACE):
        if text := stretch.text.replace("\n", ""):
            yield Stretch(text, stretch.style)


def _special(token: Spelled) -> Stretch:
    shown = _stretches(token.content, _UNUSUAL_OR_ODD_SPACE)
    return Stretch("".join(stretch.text for stretch in shown), "special")


def _stretches(content: bytes, to_check: re.Pattern[str]) -> Iterator[Stretch]:
    text = content.decode(errors="surrogateescape")
    position = 0
    for match in to_check.finditer(text):
        if (mark := _mark(match[0])) is None:
            continue
        if position < match.start():
            yield Stretch(text[position : match.start()])
        yield Stretch(mark, "mark")
        position = match.start() if match[0] == "\n" else match.end()
    if position < len(text):
        yield Stretch(text[position:])


def _mark(found: str) -> str | None:
    if "\udc80" <= found[0] <= "\udcff":
        return f"⟨{found.encode(errors='surrogateescape').hex(' ')}⟩"
    if found in _MARKS:
        return _MARKS[found]
    if found not in _JOINERS and unicodedata.category(found) in _INVISIBLE:
        return f"⟨U+{ord(found):04X}⟩"
    return None
