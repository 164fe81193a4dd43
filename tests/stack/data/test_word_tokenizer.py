"""The table of words has the library's ids, for any text and every pattern that it knows."""

import json
import pickle
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from helpers.real_data import TOKENIZERS as REAL_TOKENIZERS
from helpers.real_data import needs_tokenizers
from post_training.core.errors import PostTrainingError
from post_training.data import word_tokenizer
from post_training.data.word_tokenizer import _DEEPSEEK, PATTERNS, WordTokenizer

CORPUS = [
    "It's the 1st of 12,345 days; they'll say: don't!\n\n  - \"yes\"\r\n\tWE'VE paid $3.50 (50%).",
    "Ça va? naïve café, Straße, 東京の天気, привет мир — “quoted” … 🙂 e\u0301te\u0301",
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "[INST]"]

plain = st.text(st.sampled_from("aZe0 5'\"streldvmSTREX.,/!-_$<|>\t\n\r  "), max_size=30)
# Spaces of many kinds, letters that fold or compose to ASCII, marks, and what joins.
SPACES = "\u00a0 \u2028 \u2000 \u3000 \x1c \x85 \u200b \u200d \ufeff"
LETTERS = "é e\u0301 \u0301 ſ 'ſ \u212a \ufb01 \u037e 日本"
pieces = st.one_of(
    plain,
    st.sampled_from([*SPECIAL, *CORPUS, " ", "  ", *SPACES.split(" "), *LETTERS.split(" ")]),
    st.text(max_size=8),
)
texts = st.lists(pieces, max_size=8).map("".join)


def in_steps(*steps: Any, use_regex: bool = False) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    splits = [
        pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step
        for step in steps
    ]
    return pre_tokenizers.Sequence([*splits, byte_level])


WAYS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-3": in_steps(PATTERNS[1]),
    "qwen-2": in_steps(PATTERNS[2]),
    "tekken": in_steps(PATTERNS[3]),
    "o200k": in_steps(PATTERNS[4]),
    "smollm2": in_steps(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "deepseek": in_steps(*_DEEPSEEK),
}


def make_tokenizer(way: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = way
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def words_of(tokenizer: Tokenizer) -> WordTokenizer | None:
    return WordTokenizer.create(tokenizer, json.loads(tokenizer.to_str()))


@cache
def real_tokenizer(name: str) -> tuple[Tokenizer, WordTokenizer]:
    tokenizer = Tokenizer.from_file(str(REAL_TOKENIZERS / name / "tokenizer.json"))
    words = words_of(tokenizer)
    assert words is not None
    return tokenizer, words


def of_library(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


TOKENIZERS = [make_tokenizer(way) for way in WAYS.values()]
WORDS = [words_of(tokenizer) for tokenizer in TOKENIZERS]


@pytest.mark.parametrize("number", range(len(WAYS)), ids=WAYS)
@given(text=plain)
@settings(max_examples=300)
def test_plain_text_is_cut_as_the_library_cuts_it(number: int, text: str):
    pieces = TOKENIZERS[number].pre_tokenizer.pre_tokenize_str(text)
    as_bytes = str.maketrans("ĠĊĉč", " \n\t\r")
    expected = [piece.translate(as_bytes) for piece, _ in pieces]
    assert WORDS[number].words.findall(text) == expected


@pytest.mark.parametrize("number", range(len(WAYS)), ids=WAYS)
@given(batch=st.lists(texts, max_size=3))
@settings(max_examples=150)
def test_ids_of_any_text_are_the_librarys(number: int, batch: list[str]):
    expected = [of_library(TOKENIZERS[number], text) for text in batch]
    assert WORDS[number].encode(batch) == expected


@given(batch=st.lists(texts, max_size=3))
@settings(max_examples=100)
def test_ids_of_composed_text_and_of_whole_words_are_the_librarys(batch: list[str]):
    state = json.loads(TOKENIZERS[1].to_str())
    state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.NFC()
    expected = [of_library(tokenizer, text) for text in batch]
    assert words_of(tokenizer).encode(batch) == expected


def test_ids_do_not_depend_on_what_was_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(word_tokenizer, "_MOST_WORDS", 3)
    monkeypatch.setattr(word_tokenizer, "_LONGEST_WORD", 4)
    words = words_of(TOKENIZERS[1])
    for text in ("".join(SPECIAL), *CORPUS, *reversed(CORPUS)):
        assert words.encode([text, text]) == [of_library(TOKENIZERS[1], text)] * 2
    assert max(map(len, words._table)) == 4


def test_words_go_to_other_processes():
    used = words_of(TOKENIZERS[0])
    used.encode(CORPUS)
    words = pickle.loads(pickle.dumps(used))
    assert not words._table
    assert words.encode(CORPUS) == [of_library(TOKENIZERS[0], text) for text in CORPUS]


@given(batch=st.lists(texts, max_size=3))
@settings(max_examples=100)
def test_added_tokens_that_are_normalized_are_found_after_the_others(batch: list[str]):
    tokenizer = Tokenizer.from_str(TOKENIZERS[0].to_str())
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ("x<|", "it", "|im")])
    assert words_of(tokenizer).encode(batch) == [of_library(tokenizer, text) for text in batch]
    tokenizer.normalizer = normalizers.NFC()
    assert words_of(tokenizer) is None


@needs_tokenizers
@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3", "smollm2"])
@given(batch=st.lists(texts, max_size=3))
@settings(max_examples=40, deadline=None)
def test_ids_of_real_tokenizers_are_the_librarys(name: str, batch: list[str]):
    tokenizer, words = real_tokenizer(name)
    assert words.encode(batch) == [of_library(tokenizer, text) for text in batch]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_token_that_looks_around_is_left_to_the_library(flag: str):
    tokenizer = Tokenizer.from_str(TOKENIZERS[0].to_str())
    assert words_of(tokenizer) is not None
    tokenizer.add_tokens([AddedToken("<think>", **{"normalized": False, flag: True})])
    assert words_of(tokenizer) is None


def test_merges_that_are_left_out_at_random_are_left_to_the_library():
    state = json.loads(TOKENIZERS[0].to_str())
    state["model"]["dropout"] = 0.1
    assert words_of(Tokenizer.from_str(json.dumps(state))) is None


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        in_steps(pre_tokenizers.Digits(), use_regex=True),
        in_steps(*_DEEPSEEK[1:]),
        in_steps(*_DEEPSEEK, pre_tokenizers.Punctuation()),
    ],
)
def test_other_ways_to_cut_are_left_to_the_library(pre_tokenizer: Any):
    tokenizer = Tokenizer.from_str(TOKENIZERS[0].to_str())
    tokenizer.pre_tokenizer = pre_tokenizer
    assert words_of(tokenizer) is None
    assert words_of(make_tokenizer(in_steps(re.sub("s", "x", PATTERNS[1], count=1)))) is None


def test_words_that_the_library_cuts_otherwise_are_noticed_in_the_data():
    tokenizer = make_tokenizer(WAYS["gpt-2"])
    words = words_of(tokenizer)
    assert words is not None
    assert words.encode(["It's 12", "fine"]) == [
        of_library(tokenizer, "It's 12"),
        [*of_library(tokenizer, "fine")],
    ]
    wrong = replace(words, words=re.compile(r"\S+|\s+"))
    with pytest.raises(
        PostTrainingError, match="other ids than the tokenizers library, from token"
    ):
        wrong.encode(["say: it's 12 of 345 don't"])
