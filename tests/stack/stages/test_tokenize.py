"""`entrypoint tokenize`: the same bytes each time, readable by Megatron, whatever the workers."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from helpers.real_data import GSM8K, needs_gsm8k
from helpers.tokenize_runs import (
    GOOD,
    OTHER,
    document,
    tokenize,
    tokenize_with_two_workers,
    train_model,
    write_lines,
)
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.data.sources import CHUNK_BYTES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("sentencepiece") / "tiny.model")


@pytest.fixture(scope="module")
def long_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 MiB, so several chunks, with a bad line now and then."""
    lines = [
        {"text": document(f"What is {a}?", f"It is {a * a}, she says. " * 30 if a % 97 else " ")}
        for a in range(5500)
    ]
    return write_lines(tmp_path_factory.mktemp("long") / "long.jsonl", *lines)


def read_all(prefix: Path) -> list[list[int]]:
    from post_training.data.indexed import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [tokens.tolist() for tokens in dataset.read_many(range(len(dataset)))]


def test_tokenize_writes_ids_and_kinds_that_megatron_reads(model: Path, tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    data = write_lines(tmp_path / "chat.jsonl", GOOD, OTHER)
    metrics = tokenize(tmp_path / "run", inputs=[data], tokenizer=model, output_prefix="chat")
    expected, kinds = [], []
    for turns in (["What is 2 + 2?", "It is 4, she says."], ["1?", "It is 1", "And 2 + 3?", "5"]):
        ids, marks = [], []
        for number, turn in enumerate(turns):
            marker, encoded = 7 + number % 2, processor.encode(turn)
            ids += [marker, *encoded, marker]
            marks += [0] + [number % 2] * (len(encoded) + 1)
        expected.append([*ids, 3])
        kinds.append([*marks, 1])
    folder = tmp_path / "run/dataset"
    theirs = IndexedDataset(str(folder / "chat_text_document"))
    assert [theirs[index].tolist() for index in range(len(theirs))] == expected
    assert theirs.document_indices.tolist() == [0, 1, 2]
    assert read_all(folder / "chat_text_document") == expected
    assert read_all(folder / "chat_kinds_document") == kinds
    assert metrics == {
        "num_documents": 2,
        "num_tokens": sum(map(len, expected)),
        "num_trained_tokens": sum(map(sum, kinds)),
    }
    columns = [{"name": "text", "read_as": "text", "number": 2}]
    sources = [{"num_source_rows": 2, "columns": columns}]
    counts = json.loads((folder / "counts.json").read_text())
    assert counts == {**metrics, "rejected": {}, "sources": sources}
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_kinds_document.bin",
        "chat_kinds_document.idx",
        "chat_text_document.bin",
        "chat_text_document.idx",
        "counts.json",
    ]


def test_tokenize_counts_columns_that_are_not_read_and_refuses_what_is_trained_otherwise(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = write_lines(tmp_path / "first.jsonl", {**GOOD, "topic": "sums"}, GOOD)
    second = write_lines(tmp_path / "second.jsonl", {**GOOD, "loss_mask": [0]})
    settings = {"inputs": [first, second], "tokenizer": model}
    with pytest.raises(PostTrainingError, match="column loss_mask is not read") as raised:
        tokenize(tmp_path / "refused", **settings)
    assert "second.jsonl" in str(raised.value)
    tokenize(tmp_path / "run", **settings, ignore=["loss_mask"])
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert [
        {each["name"]: each["number"] for each in source["columns"] if each["read_as"] is None}
        for source in counts["sources"]
    ] == [{"loss_mask": 0, "topic": 1}, {"loss_mask": 1}]
    assert "first.jsonl: not read: loss_mask (0), topic (1)" in capsys.readouterr().err


def test_tokenize_with_any_number_of_workers_gives_the_same_bytes(
    model: Path, long_input: Path, tmp_path: Path
):
    assert long_input.stat().st_size > 3.5 * 2**20
    settings = {"inputs": [long_input], "tokenizer": model, "on_error": "quarantine"}
    for num_workers in (1, 2, 3):
        metrics = tokenize(tmp_path / f"run{num_workers}", num_workers=num_workers, **settings)
        assert metrics["num_documents"] == 5500 - 57
    one, two, three = (hash_files(tmp_path / f"run{number}/dataset") for number in (1, 2, 3))
    assert one == two == three
    assert "rejects.jsonl" in one


@pytest.mark.parametrize("num_workers", [1, 2])
def test_tokenize_max_rows_is_the_first_good_documents(
    model: Path, long_input: Path, tmp_path: Path, num_workers: int
):
    settings = {"inputs": [long_input], "tokenizer": model, "on_error": "quarantine"}
    tokenize(tmp_path / "all", **settings)
    metrics = tokenize(tmp_path / "run", max_rows=3000, num_workers=num_workers, **settings)
    assert metrics["num_documents"] == 3000
    prefix = "dataset/data_text_document"
    assert read_all(tmp_path / "run" / prefix) == read_all(tmp_path / "all" / prefix)[:3000]
    rejects = (tmp_path / "run/dataset/rejects.jsonl").read_text().splitlines()
    # Of the lines up to the 3000th good one: multiples of 97.
    assert [json.loads(line)["line"] for line in rejects] == list(range(1, 3032, 97))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_tokenize_fail_names_the_first_bad_line_and_leaves_nothing(
    model: Path, long_input: Path, tmp_path: Path, num_workers: int
):
    good = write_lines(tmp_path / "good.jsonl", GOOD)
    settings = {"inputs": [good, long_input], "tokenizer": model, "num_workers": num_workers}
    with pytest.raises(PostTrainingError) as error:
        tokenize(tmp_path / "run", **settings)
    assert error.value.where == f"{long_input}:1"
    assert error.value.problem == "turn 2: the assistant says nothing"
    assert list((tmp_path / "run").iterdir()) == []


def test_tokenize_started_again_removes_what_a_killed_attempt_left(model: Path, tmp_path: Path):
    data = write_lines(tmp_path / "chat.jsonl", GOOD)
    leftover = tmp_path / "run/.dataset.abc.tmp"
    leftover.mkdir(parents=True)
    (leftover / "data_text_document.bin").write_bytes(b"half")
    first = tokenize(tmp_path / "run", inputs=[data], tokenizer=model)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dataset"]
    # Killed after the dataset was complete, before the record was closed.
    assert tokenize(tmp_path / "run", inputs=[data], tokenizer=model) == first


def test_tokenize_with_a_hugging_face_tokenizer(init_model: Any, tmp_path: Path):
    folder = init_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    data = write_lines(tmp_path / "chat.jsonl", GOOD)
    tokenize(
        tmp_path / "run",
        inputs=[data],
        tokenizer=folder,
        control_tokens={"user": user, "assistant": assistant},
        eod="</s>",
    )
    asked, answered = (
        tokenizer(text)["input_ids"] for text in ("What is 2 + 2?", "It is 4, she says.")
    )
    assert read_all(tmp_path / "run/dataset/data_text_document") == [
        [user, *asked, user, assistant, *answered, assistant, tokenizer.eos_token_id]
    ]


@needs_gsm8k
def test_tokenize_trains_exactly_the_answers_of_gsm8k(tmp_path: Path):
    from post_training.data.indexed import IndexedDataset, open_kinds

    rows = [json.loads(line) for line in (GSM8K / "test.jsonl").open()]
    corpus = [text for row in rows for text in row.values()]
    model = train_model(tmp_path / "m.model", corpus, vocab_size=1000)
    lines = [{"text": document(row["question"], row["answer"])} for row in rows]
    data = write_lines(tmp_path / "gsm8k.jsonl", *lines)
    tokenize(tmp_path / "run", inputs=[data], tokenizer=model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = IndexedDataset(tmp_path / "run/dataset/data_text_document")
    kinds = open_kinds(tmp_path / "run/dataset/data_kinds_document", tokens)
    for index, row in enumerate(rows):
        trained = tokens.read(index)[np.flatnonzero(kinds.read(index) == 1)].tolist()
        assert trained == [*processor.encode(row["answer"]), 8, 3]


def _workers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_tokenize_worker_that_is_killed_ends_the_run_with_an_error(model: Path, tmp_path: Path):
    data = tmp_path / "several_chunks.jsonl"
    line = json.dumps({"text": document("What?", "It is 4. " * 100)}) + "\n"
    data.write_text(line * (16 * CHUNK_BYTES // len(line)))
    run_dir = tmp_path / "run"
    child = multiprocessing.get_context("spawn").Process(
        target=tokenize_with_two_workers, args=(data, model, run_dir)
    )
    child.start()
    deadline = time.monotonic() + 60
    # They are still starting: none has read a chunk.
    while not (workers := _workers_of(child.pid)):
        assert child.is_alive()
        assert time.monotonic() < deadline
    os.kill(workers[0], signal.SIGKILL)
    child.join(timeout=60)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 1
    told = run_dir.with_suffix(".error").read_text()
    assert "a worker process was killed" in told
    assert list(run_dir.iterdir()) == []
