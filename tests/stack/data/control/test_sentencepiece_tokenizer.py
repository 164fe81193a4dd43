"""Converted tokenizers against SentencePiece itself."""

import io
import itertools
import json
import random
from typing import Any

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from helpers.real_data import GSM8K, needs_gsm8k
from post_training.core.errors import PostTrainingError
from post_training.data.control.conversion import (
    require_same_ids,
    special_pieces,
    to_fast_tokenizer,
)
from post_training.data.control.documents import SentencePieceSpans
from post_training.data.rows import Place, Record

CONTROL, BREAK = "<|user|>", "\n"
CORPUS = [
    f"Natalia sold {a} clips in April, and then {b} more in May.\nHow many? "
    f"She sold {a}+{b} = <<{a}+{b}={a + b}>>{a + b} clips.\n#### {a + b}"
    for a in range(10, 60)
    for b in range(7, 27)
]
# What normalisation, spaces and unknown characters are about.
PARTS = (
    *("Natalia", "sold", " ", "  ", "\n", "\t", " April", "48", "0", "é", "e\u0301", "漢字", "🙂"),
    *(
        "👩‍👩‍👧",
        "\u3000",
        "ﬁ",
        "①",
        "▁",
        "\u200b",
        "Ⅷ",
        "한국",
        "नमस्ते",
        "\u00a0",
        "...",
        "don't",
        "<<",
        ">>",
    ),
)


def trained(**settings: Any) -> ModelProto:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=400,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
        **settings,
    )
    return ModelProto.FromString(written.getvalue())


def control_id(model: ModelProto) -> int:
    return [piece.piece for piece in model.pieces].index(CONTROL)


def converted(model: ModelProto, control_ids: frozenset[int] = frozenset()):
    tokenizer = to_fast_tokenizer(model, control_ids)
    return lambda texts: [
        encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def nasty_texts(number: int) -> list[str]:
    choose = random.Random(0)
    return [
        "".join(choose.choice(PARTS) for _ in range(choose.randint(1, 10))) for _ in range(number)
    ]


def records(texts: list[str]) -> list[Record]:
    return [
        Record(Place("corpus.jsonl", number), {"text": text}, b"")
        for number, text in enumerate(texts, start=1)
    ]


SETTINGS = {
    "model_type": ["bpe", "unigram"],
    "add_dummy_prefix": [True, False],
    "byte_fallback": [True, False],
    "normalization_rule_name": ["nmt_nfkc", "identity"],
    "remove_extra_whitespaces": [True, False],
}


@pytest.mark.parametrize("values", list(itertools.product(*SETTINGS.values())), ids=str)
def test_converted_ids_are_those_of_sentencepiece(values: tuple[Any, ...]):
    settings = dict(zip(SETTINGS, values, strict=True))
    symbols = [CONTROL, "<|code|>", "<|code|><|code|>", BREAK]
    model = trained(user_defined_symbols=symbols, **settings)
    control = control_id(model)
    texts = CORPUS + nasty_texts(500) + ["<|code|>", "a <|code|><|code|> b<|code|>c", " <|code|> "]
    compared = require_same_ids(
        records(texts), SentencePieceSpans(model), converted(model, frozenset([control])), control
    )
    assert compared.num_spans == len(texts)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_converted_ids_with_spaces_inside_pieces_are_those_of_sentencepiece(model_type: str):
    model = trained(model_type=model_type, split_by_whitespace=False)
    assert any("▁" in piece.piece.lstrip("▁") for piece in model.pieces)
    require_same_ids(records(CORPUS), SentencePieceSpans(model), converted(model), None)


def test_converted_text_after_a_control_token_has_its_own_prefix():
    model = trained(user_defined_symbols=[CONTROL])
    control = control_id(model)
    [ids] = converted(model, frozenset([control]))([f"{CONTROL}Natalia{CONTROL}"])
    assert ids == [control, *SentencePieceSpans(model).encode(["Natalia"])[0], control]


def test_converted_user_defined_piece_in_a_text_breaks_no_span():
    model = trained(model_type="bpe", user_defined_symbols=["<|code|>"])
    spans = SentencePieceSpans(model)
    [ids] = converted(model)(["sold<|code|>sold"])
    assert ids == spans.encode(["sold<|code|>sold"])[0]
    behind = ids[1 + [spans.piece_of(token) for token in ids].index("<|code|>")]
    assert not spans.piece_of(behind).startswith("▁")


def test_converted_ids_lead_back_to_the_text():
    model = trained(
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    tokenizer = to_fast_tokenizer(model)
    for text in ["Natalia sold  48 clips.\n", "漢字 🙂", " x"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_converted_tokenizer_has_every_piece_at_its_id():
    model = trained(byte_fallback=True, user_defined_symbols=[CONTROL])
    tokenizer = to_fast_tokenizer(model)
    assert tokenizer.get_vocab_size() == len(model.pieces)
    assert all(tokenizer.id_to_token(key) == p.piece for key, p in enumerate(model.pieces))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model_type": "char"}, "model_type CHAR"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_converted_model_of_another_kind_is_refused(settings: dict[str, Any], kind: str):
    with pytest.raises(PostTrainingError, match=f"with {kind} can't be converted"):
        to_fast_tokenizer(trained(**settings))


def test_special_pieces_are_those_the_model_names():
    model = trained(bos_id=-1, eos_id=2, pad_id=0, unk_id=1, eos_piece="<|end|>")
    assert special_pieces(model) == {
        "eos_token": "<|end|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }


@needs_gsm8k
def test_converted_bpe_on_gsm8k_is_equal():
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").open()]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(row.values() for row in rows),
        model_writer=written,
        vocab_size=4000,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=[CONTROL, BREAK],
        minloglevel=3,
    )
    model = ModelProto.FromString(written.getvalue())
    control = control_id(model)
    texts = [text for row in rows for text in row.values()]
    compared = require_same_ids(
        records(texts), SentencePieceSpans(model), converted(model, frozenset([control])), control
    )
    assert compared.num_spans == 2 * len(rows)
