"""Whether two tokenizers give the same ids on a corpus: the gate of a conversion.

Every string of every row is compared: cut at control markers (control_tokens.py), each span alone
and behind a control token, where converted tokenizers go wrong most often.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.control.documents import spans_between_markers
from post_training.data.control.span_tokenizers import SentencePieceSpans
from post_training.data.rows import BadRow, Place, Record

_BATCH_SIZE = 1000
_TOKENS_SHOWN = 3
_CHARACTERS_SHOWN = 30


@dataclass(frozen=True)
class Compared:
    num_spans: int
    num_tokens: int


def require_same_ids(
    records: Iterable[Record],
    original: SentencePieceSpans,
    converted: Callable[[list[str]], list[list[int]]],
    control: int | None,
) -> Compared:
    """converted: ids of each text. control: the id, in both, of a control token.

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
