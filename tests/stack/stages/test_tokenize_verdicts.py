"""`entrypoint tokenize`: every bad line has a verdict."""

import json
from pathlib import Path

import pytest

from helpers.tokenize_runs import GOOD, OTHER, document, tokenize, train_model, write_lines
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("sentencepiece") / "tiny.model")


BAD_LINES = [
    (b'{"text": ', "malformed"),
    (b'{"text": "a"} {"text": "b"}', "malformed"),
    (b'{"text": "a", "text": "b"}', "malformed"),
    (b'{"text": "\xff"}', "malformed"),
    (b'{"text": "\\ud800"}', "malformed"),
    (b'["text"]', "malformed"),
    (b"{}", "columns"),
    (b'{"text": null}', "columns"),
    (b'{"text": 5}', "columns"),
    (json.dumps({"text": ""}).encode(), "empty"),
    (json.dumps({"text": "outside"}).encode(), "markers"),
    (json.dumps({"text": document("What?", "It") + "\n"}).encode(), "markers"),
    (json.dumps({"text": document("What?", "It", "And?")}).encode(), "markers"),
    (json.dumps({"text": document("What?", " \n")}).encode(), "empty"),
    (json.dumps({"text": document("What?", "It <|user|>")}).encode(), "control-token"),
]


def test_tokenize_quarantine_keeps_every_bad_line_with_its_place(model: Path, tmp_path: Path):
    good = json.dumps(GOOD).encode()
    lines = [b"\xef\xbb\xbf" + good, b""]
    for bad, _ in BAD_LINES:
        lines += [bad, good]
    data = write_lines(tmp_path / "chat.jsonl", *lines)
    metrics = tokenize(tmp_path / "run", inputs=[data], tokenizer=model, on_error="quarantine")
    assert metrics["num_documents"] == 1 + len(BAD_LINES)
    rejects = tmp_path / "run/dataset/rejects.jsonl"
    entries = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == [reason for _, reason in BAD_LINES]
    assert [entry["line"] for entry in entries] == [3 + 2 * n for n in range(len(BAD_LINES))]
    content = data.read_bytes()
    for entry, (bad, _) in zip(entries, BAD_LINES, strict=True):
        assert content[entry["byte"] :].startswith(bad + b"\n")
        assert entry["file"] == str(data)
        assert entry["problem"]
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert counts["rejected"] == {
        "malformed": 6,
        "columns": 3,
        "empty": 2,
        "markers": 3,
        "control-token": 1,
    }


def test_tokenize_skip_gives_what_the_good_lines_alone_give(model: Path, tmp_path: Path):
    bad = [line for line, _ in BAD_LINES]
    mixed = write_lines(tmp_path / "mixed.jsonl", *bad, GOOD, *bad, OTHER)
    clean = write_lines(tmp_path / "clean.jsonl", GOOD, OTHER)
    tokenize(tmp_path / "skip", inputs=[mixed], tokenizer=model, on_error="skip")
    tokenize(tmp_path / "clean", inputs=[clean], tokenizer=model)
    skip, alone = (hash_files(tmp_path / name / "dataset") for name in ("skip", "clean"))
    assert {**skip, "counts.json": ""} == {**alone, "counts.json": ""}


def test_tokenize_without_a_good_line_is_refused(model: Path, tmp_path: Path):
    data = write_lines(tmp_path / "chat.jsonl", "{}", "{}", '{"text": ""}')
    with pytest.raises(PostTrainingError) as error:
        tokenize(tmp_path / "run", inputs=[data], tokenizer=model, on_error="skip")
    assert error.value.problem == ("no document is left: 3 rows left out: 2 columns, 1 empty")
    assert list((tmp_path / "run").iterdir()) == []
