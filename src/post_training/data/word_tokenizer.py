"""Token ids by a table of words: the library's ids, at several times its speed for English text.

A byte-level BPE tokenizer cuts a text into words by a pattern and encodes each on its own, so a
word's ids can be kept. The library cuts with an engine for all of Unicode and notes where each
character came from; that takes most of its time. Here `re` cuts, and only where both engines must
agree: text of printable ASCII, by patterns that are known below. What holds another character goes
to the library, up to the next space: none of the patterns has a space but at the start of a word,
or among spaces alone.

    text -> at added tokens -> (plain) words -> table
                            -> (others) at spaces -> words or the library
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError

# How GPT-2, Llama 3, Qwen 2, and Mistral's tekken, which Apertus has, cut a text into words; from
# https://github.com/openai/gpt-2 (its encoder), and the tokenizer.json of these models.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (_GPT_2, _LLAMA_3, _QWEN_2, _TEKKEN)
# What the classes of these patterns hold of ASCII; the first ones stand in brackets already.
_IN_ASCII = {
    r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}": "A-Z",
    r"\p{Ll}\p{Lm}\p{Lo}\p{M}": "a-z",
    r"\p{L}\p{N}]": "A-Za-z0-9]",
    r"\p{L}": "[A-Za-z]",
    r"\p{N}": "[0-9]",
}
_NOT_PLAIN = re.compile(r"[^\t\n\r -~]")
_BEFORE_SPACE = re.compile(r"(?<=[!-~\w])(?= )")
# As byte-level BPE writes these bytes; the other plain ones stand for themselves.
_AS_BYTES = {ord("\t"): "ĉ", ord("\n"): "Ċ", ord("\r"): "č", ord(" "): "Ġ"}
_MOST_WORDS = 1 << 18  # of a table, some 50 MB; a full one is emptied
_LONGEST_WORD = 64
# Texts of each call that the library encodes too: the first rows of each source are among them.
_PROVED = 2


class _Table(dict[str, tuple[int, ...] | list[int]]):
    """The ids of words; those of a plain word are computed when it is first asked for."""

    def __init__(self, backend: Tokenizer, added: dict[str, int]):
        self._model = backend.model
        self._added = added

    def __missing__(self, word: str) -> tuple[int, ...]:
        if word in self._added:
            ids = (self._added[word],)
        else:
            ids = tuple(token.id for token in self._model.tokenize(word.translate(_AS_BYTES)))
        if len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids


@dataclass(frozen=True)
class WordTokenizer:
    """words: the pattern, for plain text. added: {added token: id}, which no word goes across."""

    backend: Tokenizer
    words: re.Pattern[str]
    added: dict[str, int]
    at_added: re.Pattern[str]

    @classmethod
    def create(cls, backend: Tokenizer, state: dict[str, Any]) -> "WordTokenizer | None":
        """None where the words of a text can't be known this way.

        backend: byte-level BPE that tokenize.byte_lengths knows. state: its tokenizer.json.
        """
        if state["model"].get("dropout"):
            return None  # A word has other ids each time.
        pattern = _pattern(state["pre_tokenizer"])
        tokens = state["added_tokens"]
        moving = ("lstrip", "rstrip", "single_word", "normalized")
        if pattern not in PATTERNS or any(token[flag] for token in tokens for flag in moving):
            return None
        added = {token["content"]: token["id"] for token in tokens if token["content"]}
        return cls(backend, ascii_pattern(pattern), added, re.compile(f"({any_of([*added])})"))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without what a post-processor adds.

        Errors: PostTrainingError where the library has others for one of the first texts.
        """
        table = self._table
        if len(table) > _MOST_WORDS:
            table.clear()
        others: dict[str, None] = {}
        cut = [self._words(text, others) for text in texts]
        new = [part for part in others if part not in table]
        encodings = self.backend.encode_batch_fast(new, add_special_tokens=False)
        table.update((part, each.ids) for part, each in zip(new, encodings, strict=True))
        ids = [list(chain.from_iterable(map(table.__getitem__, words))) for words in cut]
        for part in new:
            if len(part) > _LONGEST_WORD:
                del table[part]
        self._prove(texts[:_PROVED], ids)
        return ids

    def _prove(self, texts: list[str], ids: list[list[int]]) -> None:
        """Compare with the library, on the data itself: a wrong id would spoil it in silence."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        for text, own, encoding in zip(texts, ids, encodings, strict=False):
            if own != encoding.ids:
                place = next(
                    (n for n, pair in enumerate(zip(own, encoding.ids, strict=False))
                     if pair[0] != pair[1]),
                    min(len(own), len(encoding.ids)),
                )  # fmt: skip
                raise PostTrainingError(
                    f"our table of words gives other ids than the tokenizers library, from token "
                    f"{place} on: {own[place : place + 3]}, must be "
                    f"{encoding.ids[place : place + 3]} (text: {text[:60]!r})",
                    where="the tokenizer",
                    hint="this is a fault of ours: tell us the tokenizer and the text",
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the table, which a worker fills for itself."""
        return type(self), (self.backend, self.words, self.added, self.at_added)

    @cached_property
    def _table(self) -> _Table:
        return _Table(self.backend, self.added)

    def _words(self, text: str, others: dict[str, None]) -> list[str]:
        """The words of a text. others: gets those that are not plain, which may be several."""
        words: list[str] = []
        for index, between in enumerate(self.at_added.split(text) if self.added else [text]):
            if index % 2:
                words.append(between)
            elif not _NOT_PLAIN.search(between):
                words += self.words.findall(between)
            else:
                for part in _BEFORE_SPACE.split(between):
                    if _NOT_PLAIN.search(part):
                        others[part] = None
                        words.append(part)
                    else:
                        words += self.words.findall(part)
        return words


def ascii_pattern(pattern: str) -> re.Pattern[str]:
    """What one of PATTERNS means for plain text."""
    for classes, letters in _IN_ASCII.items():
        pattern = pattern.replace(classes, letters)
    return re.compile(pattern)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT_2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def any_of(tokens: list[str]) -> str:
    """A pattern that finds the longest of the tokens at a place.

    It branches by character: with a thousand special tokens, a pattern that tries them in turn
    takes longer at each `<` of a text than tokenising it does.
    """
    rest_by_first: dict[str, list[str]] = {}
    for token in filter(None, tokens):
        rest_by_first.setdefault(token[0], []).append(token[1:])
    branches = [re.escape(first) + any_of(rest) for first, rest in rest_by_first.items()]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in tokens else "")
