"""The gate of a conversion: it must notice what converted tokenizers get wrong."""

import io
from typing import Any

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import normalizers, pre_tokenizers

from post_training.core.errors import PostTrainingError
from post_training.data.control.conversion import Compared, require_same_ids, to_fast_tokenizer
from post_training.data.control.documents import SentencePieceSpans
from post_training.data.rows import BadRow, Place, Record

CONTROL = 3
CORPUS = [f"Natalia sold {a} clips in April, and then {a + 7} more in May." for a in range(300)]


@pytest.fixture(scope="module")
def model() -> ModelProto:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|user|>"],
        num_threads=1,
        minloglevel=3,
    )
    return ModelProto.FromString(written.getvalue())


@pytest.fixture
def spans(model: ModelProto) -> SentencePieceSpans:
    return SentencePieceSpans(model)


@pytest.fixture
def converted(model: ModelProto) -> Any:
    return ids_of(to_fast_tokenizer(model, frozenset([CONTROL])))


def ids_of(tokenizer: Any) -> Any:
    return lambda texts: [
        each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)
    ]


def records(*texts: str) -> list[Record]:
    return [
        Record(Place("corpus.jsonl", number), {"text": text}, b"")
        for number, text in enumerate(texts, start=1)
    ]


def test_gate_names_the_first_difference_and_its_line(spans, converted):
    # SentencePiece's map composes jamo to a syllable; the converted tokenizer's does not.
    texts = ["Natalia", "She sold \u1100\u1161 clips", "\u1100\u1161"]
    with pytest.raises(PostTrainingError) as error:
        require_same_ids(records(*texts), spans, converted, None)
    assert error.value.where == "corpus.jsonl:2"
    assert error.value.problem.startswith("the ids differ after 'She sold ': SentencePiece goes on")
    theirs, ours = error.value.problem.split(", the converted tokenizer with ")
    assert "'<0xEA>'" in theirs
    assert "'<0xE1>'" in ours


def test_gate_catches_a_prefix_that_is_missing_after_a_control_token(model, spans):
    tokenizer = to_fast_tokenizer(model, frozenset([CONTROL]))
    # What transformers' own converter makes of a Llama model: equal at the start of a text only.
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    corpus = records("Natalia sold clips")
    assert require_same_ids(corpus, spans, ids_of(tokenizer), None).num_spans == 1
    with pytest.raises(PostTrainingError, match=r"ids differ after '<\|user\|>'"):
        require_same_ids(corpus, spans, ids_of(tokenizer), CONTROL)


def test_gate_catches_a_token_too_many_at_the_end(spans, converted):
    def longer(texts: list[str]) -> list[list[int]]:
        return [[*ids, CONTROL] for ids in converted(texts)]

    with pytest.raises(PostTrainingError, match="SentencePiece goes on with nothing"):
        require_same_ids(records("Natalia"), spans, longer, None)


def test_gate_cuts_documents_at_their_markers(spans, converted):
    text = "<<<|user|>>>Natalia<<<|user|>>><<<|assistant|>>>48<<<|assistant|>>>"
    assert require_same_ids(records(text), spans, converted, CONTROL).num_spans == 2


def test_gate_compares_every_string_of_a_row(spans, converted):
    row = {"messages": [{"role": "user", "content": "Natalia", "n": 1}], "tags": ["April", ""]}
    compared = require_same_ids([Record(Place("f", 1), row, b"")], spans, converted, None)
    num_tokens = sum(map(len, spans.encode(["user", "Natalia", "April"])))
    assert compared == Compared(num_spans=3, num_tokens=num_tokens)


def test_gate_without_a_text_is_refused(spans, converted):
    with pytest.raises(PostTrainingError, match="no text to compare"):
        require_same_ids(records(""), spans, converted, None)


def test_gate_row_that_cannot_be_read_is_refused(spans, converted):
    bad = Record(Place("f", 3), BadRow("malformed", "malformed JSON"), b"{")
    with pytest.raises(PostTrainingError, match="f:3: malformed JSON"):
        require_same_ids([bad], spans, converted, None)
