"""Documents with control markers: their grammar, ids and what is trained of them."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.control.documents import (
    DocumentEncoder,
    load_span_tokenizer,
    spans_between_markers,
    turns_of,
)
from post_training.data.rows import BadRow

U, A = "<<<|user|>>>", "<<<|assistant|>>>"
EOD, USER, ASSISTANT = 3, 7, 8
SYMBOLS = ["<|endoftext|>", "<|system|>", "<|a|>", "<|b|>", "<|user|>", "<|assistant|>"]
CORPUS = [
    f"What is {a} + {b}? It is {a + b}, says the teacher." for a in range(20) for b in range(5)
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with its control tokens at 3, 7 and 8."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=90,
        model_type="bpe",
        user_defined_symbols=SYMBOLS,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="session")
def naive(model: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture
def encoder(model: Path) -> DocumentEncoder:
    return DocumentEncoder(load_span_tokenizer(model), USER, ASSISTANT, "<|endoftext|>")


def fault(text: str) -> tuple[str, str]:
    with pytest.raises(BadRow) as error:
        turns_of(text)
    return error.value.reason, error.value.problem


def test_turns_are_what_stands_between_the_markers():
    text = f"{U}What?\n{U}{A} It <|user|> <<<|other|>>> is.{A}{U}a{U}{A}b{A}"
    assert turns_of(text) == ["What?\n", " It <|user|> <<<|other|>>> is.", "a", "b"]


texts = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_turns_of_any_text_are_read_back(pairs: list[tuple[str, str]]):
    text = "".join(f"{U}{asked}{U}{A}{answered}{A}" for asked, answered in pairs)
    assert turns_of(text) == [turn for pair in pairs for turn in pair]


@pytest.mark.parametrize(
    ("text", "reason", "problem"),
    [
        ("", "empty", "the text is empty"),
        ("hello", "markers", "text outside the markers at character 1: 'hello'"),
        (f"{U}a{U} {A}b{A}", "markers", "text outside the markers at character 26: ' '"),
        (f"{U}a{U}{A}b{A}\n", "markers", "text outside the markers at character 61: '\\n'"),
        (f"{U}a{A}b{A}", "markers", f"turn 1: {U} at character 1 is not closed"),
        (f"{U}a{U}{A}b", "markers", f"turn 2: {A} at character 26 is not closed"),
        (f"{U}a", "markers", f"turn 1: {U} at character 1 is not closed"),
        (f"{A}b{A}", "markers", "turn 1 is the assistant's, must be the user's"),
        (f"{U}a{U}{U}b{U}", "markers", "turn 2 is the user's, must be the assistant's"),
        (f"{U}a{U}{A}b{A}{A}c{A}", "markers", "turn 3 is the assistant's, must be the user's"),
        (f"{U}a{U}", "markers", "ends after turn 1, the user's"),
        (f"{U}a{U}{A}b{A}{U}c{U}", "markers", "ends after turn 3, the user's"),
        (f"{U}a{U}{A} \n{A}", "empty", "turn 2: the assistant says nothing"),
        (f"{U}{U}{A}b{A}", "empty", "turn 1: the user says nothing"),
    ],
)
def test_turns_that_break_the_grammar_are_a_bad_row(text: str, reason: str, problem: str):
    assert fault(text) == (reason, problem)


def test_spans_are_found_whether_markers_pair_up_or_not():
    assert spans_between_markers(f"a{U}b{A}{A}c") == ["a", "b", "c"]
    assert spans_between_markers("plain") == ["plain"]


def test_document_ids_are_those_of_its_spans_between_control_tokens(encoder, naive):
    [turns] = encoder.encode([["What is 2?", "It is 2", "two", "says the teacher"]])
    documents = encoder.join([turns])
    expected = [USER, *naive.encode("What is 2?"), USER]
    expected += [ASSISTANT, *naive.encode("It is 2"), ASSISTANT]
    expected += [USER, *naive.encode("two"), USER]
    expected += [ASSISTANT, *naive.encode("says the teacher"), ASSISTANT, EOD]
    assert documents.tokens.tolist() == expected
    assert documents.lengths.tolist() == [len(expected)]
    assert naive.id_to_piece(expected[1]).startswith("▁")


def test_document_kinds_train_the_answer_its_end_and_the_end_of_document(encoder, naive):
    turns = ["What is 2?", "It is 2"]
    documents = encoder.join(encoder.encode([turns]))
    num_asked, num_answered = (len(naive.encode(turn)) for turn in turns)
    assert documents.kinds.tolist() == [0] * (num_asked + 3) + [1] * (num_answered + 2)
    assert documents.kinds.dtype == np.uint8
    trained = documents.tokens[documents.kinds == 1].tolist()
    assert trained == [*naive.encode("It is 2"), ASSISTANT, EOD]


def test_documents_stand_one_after_another(encoder):
    good = encoder.encode([["What", "It"], ["the teacher", "says"], ["2", "4"]])
    together = encoder.join(good)
    alone = [encoder.join([document]) for document in good]
    assert np.array_equal(together.tokens, np.concatenate([each.tokens for each in alone]))
    assert np.array_equal(together.kinds, np.concatenate([each.kinds for each in alone]))
    assert together.lengths.tolist() == [len(each.tokens) for each in alone]
    two = together.first(2)
    assert two.lengths.tolist() == together.lengths.tolist()[:2]
    assert len(two.tokens) == len(two.kinds) == sum(two.lengths)


def test_document_without_an_end_has_none(model: Path):
    encoder = DocumentEncoder(load_span_tokenizer(model), USER, ASSISTANT, None)
    assert encoder.join(encoder.encode([["What", "It"]])).tokens[-1] == ASSISTANT


def test_document_encoder_in_another_process_gives_the_same(encoder):
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode([["What", "It"]]) == encoder.encode([["What", "It"]])


@pytest.mark.parametrize(
    ("piece", "token"), [("<|user|>", USER), ("<|assistant|>", ASSISTANT), ("<|endoftext|>", EOD)]
)
def test_document_that_spells_out_a_control_token_is_a_bad_row(encoder, piece: str, token: int):
    bad, good = encoder.encode([["What", f"It {piece}is"], ["What", "It <|system|>"]])
    assert isinstance(good, list)
    assert (bad.reason, bad.problem) == (
        "control-token",
        f"turn 2 spells out {piece}, which becomes control token {token}",
    )


def test_document_with_a_turn_that_leaves_no_token_is_a_bad_row(encoder):
    [bad] = encoder.encode([["\u200b", "It"]])
    assert (bad.reason, bad.problem) == ("empty", "turn 1 holds no character of the tokenizer's")


@pytest.mark.parametrize(
    ("user", "assistant", "eod", "problem"),
    [
        (7, 7, None, "control_tokens: must differ (both are 7)"),
        (90, 8, None, "control_tokens.user: must be < 90, the vocabulary (got 90)"),
        (7, 30, None, "control_tokens.assistant: 30 is '"),
        (7, 0, None, "control_tokens.assistant: 0 is '<unk>', an ordinary piece"),
        (7, 8, "<|end|>", "eod: '<|end|>' is not in the tokenizer's vocabulary"),
        (7, 8, "<unk>", "eod: 0 is '<unk>', an ordinary piece"),
    ],
)
def test_document_encoder_without_its_control_tokens_is_refused(
    model: Path, user: int, assistant: int, eod: str | None, problem: str
):
    with pytest.raises(UsageError) as error:
        DocumentEncoder(load_span_tokenizer(model), user, assistant, eod)
    assert str(error.value).startswith(problem)


def test_document_encoder_says_which_pieces_it_writes(encoder):
    assert encoder.describe() == (
        "user 7 <|user|>, assistant 8 <|assistant|>, end of document 3 <|endoftext|>"
    )


def test_span_tokenizer_of_a_hugging_face_folder_encodes_without_special_tokens(
    tokenizer: Any, tmp_path: Path
):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.save_pretrained(tmp_path)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    encoder = DocumentEncoder(load_span_tokenizer(tmp_path), user, assistant, "</s>")
    good, bad = encoder.encode([["abc", "d"], ["a", "<s>"]])
    assert [tokenizer.decode(ids) for ids in good] == ["abc", "d"]
    assert bad.problem == "turn 2 spells out <s>, which becomes control token 0"
    assert encoder.vocab_size == len(tokenizer)
    assert encoder.join([good]).tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\x03abc"])
def test_span_tokenizer_of_another_file_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(PostTrainingError, match=r"some.model: not a SentencePiece model"):
        load_span_tokenizer(path)


def test_span_tokenizer_of_another_folder_is_refused(tmp_path: Path):
    with pytest.raises(PostTrainingError, match=r"tokenizer.json: no such file"):
        load_span_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PostTrainingError, match=r"tokenizer.json: not a tokenizer: "):
        load_span_tokenizer(tmp_path)
