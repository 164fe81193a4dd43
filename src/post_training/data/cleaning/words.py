"""The words of a row, and hashes of so many words in a row: what cleaning compares.

    row -> texts (what is said, without system messages, roles, ids and tools) -> words -> n-grams

Words are in lower case. A character of a script without spaces (Chinese, Japanese, Korean) is a
word; Thai, Lao and Khmer are cut at their spaces alone.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from jaxtyping import UInt64

from post_training.data.formats.columns import Format

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_WORDS_AND_SIGNS = re.compile(rf"{_WORDS.pattern}|[^\w\s]")
# Columns and fields that hold no text of the row's own.
_NOT_SAID = frozenset(("system", "tools"))
_NO_TEXT = frozenset(("id", "type", "name", "tool_call_id", "tools"))
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost
_MIXER = np.uint64(0xFF51AFD7ED558CCD)  # of MurmurHash3, by A. Appleby
_HALF = np.uint64(33)


def texts_of(value: dict[str, Any], found: Format) -> Iterator[str]:
    """What a row says: prompt and answers, of the columns that its format reads."""
    columns = [given for name, given in found.columns.items() if name not in _NOT_SAID]
    for name in found.optional:
        if name not in _NOT_SAID:
            columns += [given for given in found.names(name) if given not in columns]
    for column in columns:
        yield from _texts_below(value.get(column), found.messages.role)


def all_texts(value: Any) -> Iterator[str]:
    """Every text of a row of a benchmark, whatever its columns."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from all_texts(each)


def words_of(text: str, *, signs: bool) -> list[str]:
    """signs: each sign is a word too, so that 3 + 4 and 3 - 4 differ."""
    return (_WORDS_AND_SIGNS if signs else _WORDS).findall(text.casefold())


def hash_ngrams(words: list[str], size: int) -> UInt64[np.ndarray, " ngrams"]:
    """A hash of every `size` words that follow each other.

    h = mix(sum over k of xxh3_64(word k) * m^(size - 1 - k)), modulo 2^64: the same on every
    machine.
    """
    number = len(words) - size + 1
    if number < 1:
        return np.zeros(0, np.uint64)
    own = np.fromiter(map(_hash_word, words), np.uint64, len(words))
    hashes = np.zeros(number, np.uint64)
    for start in range(size):
        hashes = hashes * _MULTIPLIER + own[start : start + number]
    hashes = (hashes ^ (hashes >> _HALF)) * _MIXER
    return hashes ^ (hashes >> _HALF)


@lru_cache(maxsize=1 << 17)
def _hash_word(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def _texts_below(value: Any, role: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts_below(each, role)
    elif isinstance(value, dict) and value.get(role) not in ("system", "developer"):
        for name, each in value.items():
            if name != role and name not in _NO_TEXT:
                yield from _texts_below(each, role)
