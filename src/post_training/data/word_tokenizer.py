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

# How GPT-2, Llama 3, Qwen 2, Mistral's tekken (Apertus has it) and OpenAI's o200k (gpt-oss) cut a
# text into words; from https://github.com/openai/gpt-2 (its encoder), the tokenizer.json of these
# models, and https://github.com/openai/tiktoken (openai_public.py).
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
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _ENDING +
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _ENDING +
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
PATTERNS = (_GPT_2, _LLAMA_3, _QWEN_2, _TEKKEN, _O200K)
# Cut in steps: a step sees the pieces of the one before it, so spaces end where digits begin. These
# are the steps together, for plain text alone. SmolLM2's digits stand alone, before GPT-2's words.
_DIGITS_THEN_GPT_2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
)
# DeepSeek-V3's, from its tokenizer.json: numbers, then Chinese and Japanese, then the rest.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_DEEPSEEK_PLAIN = (
    r"[0-9]{1,3}|[!-/:-@\[-`{-~][A-Za-z]+|[\t ]?[A-Za-z]+| ?[!-/:-@\[-`{-~]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?![^\s0-9])|\s+"
)
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
    """words: the pattern, for plain text. added: {added token: id}, which no word goes across.
    at_added: the library looks for tokens that are not normalized first; for the others after it.
    """

    backend: Tokenizer
    words: re.Pattern[str]
    added: dict[str, int]
    at_added: tuple[re.Pattern[str], ...]

    @classmethod
    def create(cls, backend: Tokenizer, state: dict[str, Any]) -> "WordTokenizer | None":
        """None where the words of a text can't be known this way.

        backend: byte-level BPE that tokenize.byte_lengths knows. state: its tokenizer.json.
        """
        if state["model"].get("dropout"):
            return None  # A word has other ids each time.
        words = _plain_pattern(state["pre_tokenizer"])
        tokens = [token for token in state["added_tokens"] if token["content"]]
        moving = ["lstrip", "rstrip", "single_word"]
        if not is_empty_step(state["normalizer"]):
            moving.append("normalized")
        if words is None or any(token[flag] for token in tokens for flag in moving):
            return None
        added = {token["content"]: token["id"] for token in tokens}
        passes = [[t["content"] for t in tokens if t["normalized"] == last] for last in (0, 1)]
        at_added = tuple(re.compile(f"({any_of(each)})") for each in passes if each)
        return cls(backend, words, added, at_added)

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

    def _at_added_tokens(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces, and whether each is an added token."""
        pieces = [(text, False)]
        for pattern in self.at_added:
            pieces = [
                (part, is_added or index % 2 == 1)
                for between, is_added in pieces
                for index, part in enumerate([between] if is_added else pattern.split(between))
            ]
        return pieces

    def _words(self, text: str, others: dict[str, None]) -> list[str]:
        """The words of a text. others: gets those that are not plain, which may be several."""
        words: list[str] = []
        for between, is_added in self._at_added_tokens(text):
            if is_added:
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


def is_empty_step(step: dict[str, Any] | None) -> bool:
    """Whether a normalizer of a tokenizer.json does nothing."""
    return step is None or (step["type"] == "Sequence" and not step["normalizers"])


def ascii_pattern(pattern: str) -> re.Pattern[str]:
    """What one of PATTERNS means for plain text."""
    for classes, letters in _IN_ASCII.items():
        pattern = pattern.replace(classes, letters)
    return re.compile(pattern)


def _plain_pattern(pre_tokenizer: dict[str, Any] | None) -> re.Pattern[str] | None:
    """How plain text is cut; None for steps that are not known here."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return ascii_pattern(_GPT_2)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        }:
            return re.compile(_DIGITS_THEN_GPT_2)
        case {
            "type": "Sequence",
            "pretokenizers": [
                *splits,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            patterns = tuple(map(_isolated, splits))
            if patterns == _DEEPSEEK:
                return re.compile(_DEEPSEEK_PLAIN)
            if len(patterns) == 1 and patterns[0] in PATTERNS:
                return ascii_pattern(patterns[0])
    return None


def _isolated(step: dict[str, Any]) -> str | None:
    """The pattern of a step that cuts before and after each match, and does no more."""
    match step:
        case {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
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
