"""A SentencePiece model as a Hugging Face fast tokenizer that gives the same ids.

    text -> normalise (character map, spaces, dummy prefix, ▁) -> cut into words -> BPE or unigram

Two kinds of pieces are no words. User-defined ones are cut out of the text where they stand, as
SentencePiece does. Control ones, and the user-defined ones that are used as control tokens, are
special tokens: the text on either side is a span of its own, with its own dummy prefix. (A
tokenizer whose prefix comes from Metaspace's `first` has none after a control token, and other
ids there.) Not everything can be had (jamo and other marks that a character map composes; sums of
scores that only tie in 32 bits), so ids are compared on real texts: `require_same_ids`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from post_training.core.errors import PostTrainingError
from post_training.data.control.documents import Piece, SentencePieceSpans, spans_between_markers
from post_training.data.rows import BadRow, Place, Record

SPACE = "▁"
_BPE, _UNIGRAM = ModelProto().trainer_spec.BPE, ModelProto().trainer_spec.UNIGRAM
# A word: spaces and what follows them, up to the next space.
_WORD = Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_FIRST_PRIVATE_CHARACTER = 0xE000
# Of the comparison of ids: spans at once, and how much of a difference is shown.
_BATCH_SIZE = 1000
_TOKENS_SHOWN = 3
_CHARACTERS_SHOWN = 30


def to_fast_tokenizer(model: ModelProto, control_ids: frozenset[int] = frozenset()) -> Tokenizer:
    """The fast tokenizer of a SentencePiece model.

    control_ids: user-defined pieces that are control tokens.
    Errors: PostTrainingError for a model of a kind that has no counterpart.
    """
    _check_kind(model)
    special = [
        piece.piece
        for key, piece in enumerate(model.pieces)
        if piece.type == Piece.CONTROL or key in control_ids
    ]
    # The longest first: the longest that matches is taken.
    user_defined = sorted(
        (
            piece.piece
            for key, piece in enumerate(model.pieces)
            if piece.type == Piece.USER_DEFINED and key not in control_ids
        ),
        key=len,
        reverse=True,
    )
    is_bpe = model.trainer_spec.model_type == _BPE
    tokenizer = Tokenizer(_bpe(model) if is_bpe else _unigram(model))
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(model, user_defined)))
    cutters = []
    if user_defined:
        any_of = Regex("|".join(re.escape(piece) for piece in user_defined))
        cutters.append(pre_tokenizers.Split(any_of, "isolated"))
    if not any(_spaces_inside(piece.piece) for piece in model.pieces):
        cutters.append(pre_tokenizers.Split(_WORD, "isolated"))
    if cutters:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    tokenizer.decoder = _decoder(model)
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in special]
    )
    return tokenizer


def special_pieces(model: ModelProto) -> dict[str, str]:
    """The pieces that transformers has names for: bos_token, eos_token, pad_token, unk_token."""
    trainer = model.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    named = {f"{name}_token": model.pieces[key].piece for name, key in ids.items() if key >= 0}
    return {**named, "unk_token": model.pieces[_unknown_id(model)].piece}


def _check_kind(model: ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    unsupported = {
        f"model_type {trainer.ModelType.Name(trainer.model_type)}": trainer.model_type
        not in (_BPE, _UNIGRAM),
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces: false": not normalizer.escape_whitespaces,
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise PostTrainingError(f"a SentencePiece model with {what} can't be converted")


def _normalizers(model: ModelProto, user_defined: list[str]) -> Iterator[normalizers.Normalizer]:
    spec = model.normalizer_spec
    if spec.precompiled_charsmap:
        charsmap = normalizers.Precompiled(spec.precompiled_charsmap)
        # SentencePiece keeps user-defined pieces as they are (often a line break, which the map
        # makes a space of); here they are away under another name while the map is applied.
        changed = [piece for piece in user_defined if charsmap.normalize_str(piece) != piece]
        names = [chr(_FIRST_PRIVATE_CHARACTER + number) for number in range(len(changed))]
        yield from map(normalizers.Replace, changed, names)
        yield charsmap
        yield from map(normalizers.Replace, names, changed)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _unigram(model: ModelProto) -> models.Unigram:
    return models.Unigram(
        [(piece.piece, piece.score) for piece in model.pieces],
        _unknown_id(model),
        model.trainer_spec.byte_fallback,
    )


def _bpe(model: ModelProto) -> models.BPE:
    ids = {piece.piece: key for key, piece in enumerate(model.pieces)}
    return models.BPE(
        ids,
        list(_merges(model)),
        unk_token=model.pieces[_unknown_id(model)].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        # A user-defined piece is a word of its own that no merge leads to.
        ignore_merges=True,
    )


def _merges(model: ModelProto) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first.

    SentencePiece merges what makes the piece of the highest score, of equal ones the leftmost; it
    knows no pairs.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                yield left, right


def _unknown_id(model: ModelProto) -> int:
    return next(key for key, piece in enumerate(model.pieces) if piece.type == Piece.UNKNOWN)


def _decoder(model: ModelProto) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _spaces_inside(piece: str) -> bool:
    """Whether a piece goes on after a space that follows something else."""
    return SPACE in piece.lstrip(SPACE)


@dataclass(frozen=True)
class Compared:
    """How much was compared."""

    num_spans: int
    num_tokens: int


def require_same_ids(
    records: Iterable[Record],
    original: SentencePieceSpans,
    converted: Callable[[list[str]], list[list[int]]],
    control: int | None,
) -> Compared:
    """Refuse a converted tokenizer that gives other ids than the original on a corpus.

    Every string of every row is compared, cut at control markers (documents.py): each span alone
    and behind a control token, where converted tokenizers go wrong most often.
    converted: ids of each text. control: the id, in both, of a control token.
    Errors: PostTrainingError at the first difference, with its place and the ids of both; and for
    a row that can't be read.
    """
    num_spans = num_tokens = 0
    spans = _spans_of(records)
    while batch := list(islice(spans, _BATCH_SIZE)):
        texts = [text for _, text in batch]
        expected = original.encode(texts)
        _require(batch, expected, converted(texts), original)
        if control is not None:
            piece = original.piece_of(control)
            behind = converted([piece + text for text in texts])
            _require(batch, [[control, *ids] for ids in expected], behind, original)
        num_spans += len(batch)
        num_tokens += sum(map(len, expected))
    if not num_spans:
        raise PostTrainingError("the corpus has no text to compare the tokenizers on")
    return Compared(num_spans, num_tokens)


def _spans_of(records: Iterable[Record]) -> Iterator[tuple[Place, str]]:
    for record in records:
        if isinstance(record.value, BadRow):
            raise PostTrainingError(record.value.problem, where=str(record.place))
        for text in _strings(record.value):
            for span in spans_between_markers(text):
                yield record.place, span


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in its order; not the names of its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _require(
    batch: list[tuple[Place, str]],
    expected: list[list[int]],
    found: list[list[int]],
    original: SentencePieceSpans,
) -> None:
    for (place, _), theirs, ours in zip(batch, expected, found, strict=True):
        if theirs != ours:
            raise _difference(place, theirs, ours, original)


def _difference(
    place: Place, theirs: list[int], ours: list[int], original: SentencePieceSpans
) -> PostTrainingError:
    pairs = enumerate(zip(theirs, ours, strict=False))
    at = next((index for index, (a, b) in pairs if a != b), min(len(theirs), len(ours)))

    def shown(ids: list[int]) -> str:
        following = ids[at : at + _TOKENS_SHOWN]
        return " ".join(f"{key} {original.piece_of(key)!r}" for key in following) or "nothing"

    after = f"after {original.decode(theirs[:at])[-_CHARACTERS_SHOWN:]!r}" if at else "at the start"
    return PostTrainingError(
        f"the ids differ {after}: SentencePiece goes on with {shown(theirs)}, the "
        f"converted tokenizer with {shown(ours)}",
        where=str(place),
        hint="this model has no equal among fast tokenizers; or, if the text spells out a special "
        "token, leave the row out of the corpus",
    )
