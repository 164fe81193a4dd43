"""`entrypoint convert-tokenizer`: ids as SentencePiece gives them, or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from helpers.tokenize_runs import CORPUS, document, train_model
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import hash_files
from post_training.stages.config import ConvertTokenizerConfig, TokenizeConfig
from post_training.stages.context import StageContext


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("sentencepiece") / "tiny.model")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", *(document(*text.split("\n")) for text in CORPUS))


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def convert(run_dir: Path, **settings: Any) -> tuple[Path, dict[str, float]]:
    from post_training.stages.convert_tokenizer import run

    run_dir.mkdir(exist_ok=True)
    config = {"control_tokens": {}, "eod": "<|endoftext|>", **settings}
    result = run(ConvertTokenizerConfig.model_validate(config), StageContext(run_dir))
    return run_dir / result.artifacts["tokenizer"], result.metrics


def test_convert_tokenizer_gives_the_ids_of_tokenize(model: Path, corpus: Path, tmp_path: Path):
    folder, metrics = convert(tmp_path / "run", sentencepiece_model=model, corpus=[corpus])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    assert len(tokenizer) == processor.vocab_size() == metrics["vocab_size"]
    text = "<|user|>What is 5 + 1?<|user|><|assistant|>It is 6<|assistant|><|endoftext|>"
    expected = [7, *processor.encode("What is 5 + 1?"), 7, 8, *processor.encode("It is 6"), 8, 3]
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected[1:-6]).startswith("What is 5 + 1?<|user|>")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (3, 1)
    assert metrics["num_spans"] == 2 * len(CORPUS)


def test_convert_tokenizer_folder_is_read_by_tokenize(model: Path, corpus: Path, tmp_path: Path):
    from post_training.stages.tokenize import run

    folder, _ = convert(tmp_path / "run", sentencepiece_model=model, corpus=[corpus])
    hashes = []
    for name, tokenizer in (("original", model), ("converted", folder)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        config = {"inputs": [corpus], "tokenizer": tokenizer, "num_workers": 1}
        run(TokenizeConfig.model_validate(config), StageContext(run_dir))
        hashes.append(hash_files(run_dir / "dataset"))
    assert hashes[0] == hashes[1]


def test_convert_tokenizer_twice_gives_the_same_bytes(model: Path, corpus: Path, tmp_path: Path):
    one, _ = convert(tmp_path / "one", sentencepiece_model=model, corpus=[corpus])
    other, _ = convert(tmp_path / "other", sentencepiece_model=model, corpus=[corpus])
    before = hash_files(one)
    assert before == hash_files(other)
    # Killed after the folder was written, before the record was closed.
    convert(tmp_path / "one", sentencepiece_model=model, corpus=[corpus])
    assert hash_files(one) == before


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("What is \u1100\u1161?", "after 'What is '"),  # SentencePiece composes it to one syllable
        ("It is </s> 4", "after 'It is'"),
        ("<|user|>What", "at the start"),
    ],
)
def test_convert_tokenizer_where_ids_differ_writes_nothing(
    model: Path, tmp_path: Path, text: str, place: str
):
    corpus = write(tmp_path / "corpus.jsonl", "What is 4?", text)
    with pytest.raises(PostTrainingError) as error:
        convert(tmp_path / "run", sentencepiece_model=model, corpus=[corpus])
    assert error.value.where == f"{corpus}:2"
    assert error.value.problem.startswith(f"the ids differ {place}: Sentence")
    assert list((tmp_path / "run").iterdir()) == []


def test_convert_tokenizer_control_token_that_is_a_word_is_refused(
    model: Path, corpus: Path, tmp_path: Path
):
    with pytest.raises(UsageError, match=r"control_tokens.user: 350 is .* an ordinary piece"):
        convert(
            tmp_path / "run",
            sentencepiece_model=model,
            corpus=[corpus],
            control_tokens={"user": 350},
        )
