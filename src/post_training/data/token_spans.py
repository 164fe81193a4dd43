"""Which tokens a span of characters covers: those that hold any of its characters.

Two ways, with equal results. *Offsets*: the tokenizers library is asked for the token of a
character; right for every tokenizer. *Byte lengths*: in byte-level BPE each id spells a fixed
string of bytes, so running totals of the lengths find all spans of a batch at once, and the
library needn't keep offsets (a tenth of its time). Whether a text is spelled by its ids without
loss is checked text by text; one that is not goes the first way.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers import Encoding

# These split a text, at most they remove some of it; they don't add to it.
_SPLITTING = {"Split", "Digits", "Punctuation"}
# Of an id that stands for anything; no text is as long.
_UNKNOWN_LENGTH = 1 << 40


@dataclass(frozen=True)
class ByteLengths:
    """of_id: int64 [V], the bytes that each id spells. composed: whether the tokenizer first
    composes characters (NFC), so that only a composed text is what the ids spell."""

    of_id: np.ndarray
    composed: bool


def byte_lengths(backend: dict[str, Any]) -> ByteLengths | None:
    """None where an id has no fixed length. backend: a tokenizer.json."""
    model, normalizer = backend["model"], backend["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    steps = backend["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if len(byte_level) != 1 or byte_level[0]["add_prefix_space"]:
        return None
    if not {step["type"] for step in steps} <= {*_SPLITTING, "ByteLevel"}:
        return None
    added = {token["id"]: len(token["content"].encode()) for token in backend["added_tokens"]}
    of_id = np.full(max([*model["vocab"].values(), *added], default=0) + 1, _UNKNOWN_LENGTH)
    for token, index in model["vocab"].items():
        if token != model.get("unk_token"):
            of_id[index] = len(token)  # each character stands for a byte
    for index, length in added.items():
        of_id[index] = length
    return ByteLengths(of_id, normalizer is not None)


def spans_by_bytes(
    lengths: ByteLengths,
    ids: np.ndarray,
    ends: np.ndarray,
    texts: list[str],
    spans: list[list[tuple[int, int]]],
) -> list[list[tuple[int, int]] | None]:
    """The spans of each text in its tokens; None for a text that its ids don't spell.

    ids: int32 [N], of all texts. ends: int64 [R], where each text's ids end. spans: in characters.
    """
    byte_ends = np.cumsum(lengths.of_id.take(ids))  # [N]
    text_ends = np.where(ends > 0, byte_ends[ends - 1], 0).tolist() if len(ids) else [0] * len(ends)
    boundaries: list[int] = []
    spelled: list[bool] = []
    offset = 0
    for text, text_end, own in zip(texts, text_ends, spans, strict=True):
        positions = [position for span in own for position in span]
        size = len(text)
        if not text.isascii():
            positions = _in_bytes(text, positions)
            size = len(text.encode())
        boundaries += [offset + position for position in positions]
        spelled.append(
            size == text_end - offset
            and (not lengths.composed or unicodedata.is_normalized("NFC", text))
        )
        offset = text_end
    num_spans = list(map(len, spans))
    first_tokens = np.repeat(np.concatenate([[0], ends])[: len(ends)], num_spans)
    starts = np.searchsorted(byte_ends, boundaries[0::2], side="right") - first_tokens
    stops = np.searchsorted(byte_ends, boundaries[1::2], side="left") + 1 - first_tokens
    found = list(zip(starts.tolist(), stops.tolist(), strict=True))
    last_spans = accumulate(num_spans)
    return [
        found[last - number : last] if exact else None
        for exact, number, last in zip(spelled, num_spans, last_spans, strict=True)
    ]


def _in_bytes(text: str, positions: list[int]) -> list[int]:
    """positions: in characters, ascending."""
    in_bytes, done, total = [], 0, 0
    for position in positions:
        total += len(text[done:position].encode())
        done = position
        in_bytes.append(total)
    return in_bytes


def spans_by_offsets(encoding: Encoding, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of one text in its tokens. A character may have no token (it was normalised away,
    or only stood for a boundary of words); then the next one within the span counts."""
    found = []
    for start, end in spans:
        first = next(_tokens_of(encoding, range(start, end)), None)
        last = next(_tokens_of(encoding, range(end - 1, start - 1, -1)), None)
        if first is None or last is None:
            found.append((0, 0))
            continue
        # A character of several tokens was found by its first.
        while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1
        found.append((first, last + 1))
    return found


def _tokens_of(encoding: Encoding, positions: range) -> Iterator[int]:
    for position in positions:
        if (token := encoding.char_to_token(position)) is not None:
            yield token
