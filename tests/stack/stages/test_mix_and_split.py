"""Rows come out as they went in, each where it belongs, the same for any number of workers."""

import datetime as dt
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.models.reference import Reference
from post_training.stages.config import MixConfig, SplitConfig
from post_training.stages.context import StageContext


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(name: str, number: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{name} {n}?", "answer": f"{n}", "id": n, "topic": n % 3}
        for n in range(number)
    ]


def mix(run_dir: Path, **config: Any) -> Any:
    from post_training.stages.mix import run

    run_dir.mkdir(exist_ok=True)
    return run(MixConfig.model_validate(config), StageContext(run_dir))


def split(run_dir: Path, **config: Any) -> Any:
    from post_training.stages.split import run

    run_dir.mkdir()
    return run(SplitConfig.model_validate(config), StageContext(run_dir))


@pytest.fixture
def two(tmp_path: Path) -> list[dict[str, Any]]:
    # Large enough for several chunks, so that several workers have something to do.
    a = write(tmp_path / "a.jsonl", pairs("a" * 2000, 2000))
    b = write(tmp_path / "b.jsonl", pairs("b", 300))
    return [{"path": str(a)}, {"path": str(b)}]


def test_mix_gives_the_shares_asked_for_and_the_rows_as_they_were(two, tmp_path: Path):
    two[0] |= {"subsample_factor": 0.1}
    two[1] |= {"duplication_factor": 2, "max_rows": 500}
    result = mix(tmp_path / "run", data={"datasets": two}, source_column="source", seed=1)
    rows = read(tmp_path / "run/dataset/rows.jsonl")
    assert Counter(row["source"] for row in rows) == {"a.jsonl": 200, "b.jsonl": 500}
    assert result.metrics == {"num_rows": 700, "num_rejected": 0}
    assert all(row["question"].split()[1] == f"{row['id']}?" for row in rows)
    assert [row["source"] for row in rows] != sorted(row["source"] for row in rows)
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert counts["sources"][1] == {
        "name": "b.jsonl",
        "read_as": "prompt_completion (question, answer)",
        "num_rows": 300,
        "num_used": 500,
        "num_source_rows": 300,
        "columns": [
            {"name": "answer", "read_as": "completion", "number": 300},
            {"name": "id", "read_as": None, "number": 300},
            {"name": "question", "read_as": "prompt", "number": 300},
            {"name": "topic", "read_as": None, "number": 300},
        ],
    }


def test_mix_bytes_do_not_depend_on_the_number_of_workers(two, tmp_path: Path):
    two[0] |= {"weight": 3}
    two[1] |= {"weight": 1}
    for workers in (1, 3):
        mix(tmp_path / str(workers), data={"datasets": two, "num_workers": workers})
    assert hash_files(tmp_path / "1") == hash_files(tmp_path / "3")


def test_mix_killed_after_its_dataset_was_written_ends_all_the_same(two, tmp_path: Path):
    first = mix(tmp_path / "run", data={"datasets": two})
    before = hash_files(tmp_path / "run")
    assert mix(tmp_path / "run", data={"datasets": two}) == first
    assert hash_files(tmp_path / "run") == before


def test_mix_leaves_out_bad_rows_and_duplicates_with_reasons(tmp_path: Path):
    rows = [*pairs("x", 4), {"question": "y", "answer": " "}, *pairs("x", 2), {"question": 3}]
    path = write(tmp_path / "x.jsonl", rows)
    data = {"datasets": [{"path": str(path)}], "on_error": "quarantine", "deduplicate": True}
    mix(tmp_path / "run", data=data)
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert counts["rejected"] == {"empty": 1, "columns": 1, "duplicate": 2}
    assert len(read(tmp_path / "run/dataset/rows.jsonl")) == 4
    rejects = read(tmp_path / "run/rejects.jsonl")
    assert [(row["line"], row["reason"]) for row in rejects] == [(5, "empty"), (8, "columns")]


def test_mix_long_rows_that_differ_at_their_end_are_no_duplicates(tmp_path: Path):
    rows = [{"question": "x" * 1000, "answer": answer} for answer in ("one", "two", "one")]
    path = write(tmp_path / "x.jsonl", rows)
    mix(tmp_path / "run", data={"datasets": [{"path": str(path)}], "deduplicate": True})
    kept = read(tmp_path / "run/dataset/rows.jsonl")
    assert sorted(row["answer"] for row in kept) == ["one", "two"]


def test_mix_of_different_formats_is_refused(two, tmp_path: Path):
    texts = write(tmp_path / "t.jsonl", [{"text": "hello"}])
    with pytest.raises(PostTrainingError, match=r"different formats.*t.jsonl: text \(text\)"):
        mix(tmp_path / "run", data={"datasets": [two[1], {"path": str(texts)}]})
    assert not (tmp_path / "run/dataset").exists()


def test_mix_says_whose_logprobs_its_rows_hold_and_refuses_two(two, tmp_path: Path):
    one = Reference("a" * 64, "b" * 64, "c" * 64, "float32")
    folders = [tmp_path / "one", tmp_path / "other"]
    paths = []
    for folder in folders:
        folder.mkdir()
        one.write(folder)
        paths.append({"path": str(write(folder / "rows.jsonl", pairs(folder.name, 5)))})
    mix(tmp_path / "run", data={"datasets": paths})
    assert Reference.read(tmp_path / "run/dataset") == one
    for change in ({"weights": "d" * 64}, {"backend": "vllm"}):
        replace(one, **change).write(folders[1])
        with pytest.raises(PostTrainingError, match="of different models or backends"):
            mix(tmp_path / "again", data={"datasets": paths})
    with pytest.raises(PostTrainingError, match=r"or one has no reference\.json"):
        mix(tmp_path / "without", data={"datasets": [paths[0], two[1]]})


def test_mix_goes_through_a_transform(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", pairs("x", 10))
    code = tmp_path / "transforms.py"
    code.write_text(
        "from post_training.data.transforms import register_transform\n"
        "@register_transform('even')\n"
        "def even(row):\n"
        "    return {**row, 'answer': '!'} if row['id'] % 2 == 0 else None\n"
    )
    data = {"datasets": [{"path": str(path), "transform": "even"}], "transforms": [str(code)]}
    mix(tmp_path / "run", data=data)
    rows = read(tmp_path / "run/dataset/rows.jsonl")
    assert [(row["id"], row["answer"]) for row in rows] == [(n, "!") for n in (0, 2, 4, 6, 8)]
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert counts["rejected"] == {"filtered": 5}


@pytest.mark.parametrize("workers", [1, 2])
def test_split_has_every_row_once_and_the_strata_in_proportion(two, workers, tmp_path: Path):
    data = {"datasets": two, "num_workers": workers}
    result = split(tmp_path / "run", data=data, eval_size=0.1, stratify_by="topic", seed=3)
    train, held_out = (read(tmp_path / f"run/dataset/{side}.jsonl") for side in ("train", "eval"))
    assert result.metrics == {"num_train_rows": 2070, "num_eval_rows": 230, "num_rejected": 0}
    keys = [(row["question"][0], row["id"]) for row in [*train, *held_out]]
    assert sorted(keys) == sorted([("a", n) for n in range(2000)] + [("b", n) for n in range(300)])
    topics = Counter(row["topic"] for row in held_out)
    assert set(topics.values()) <= {76, 77}


def test_split_without_a_column_is_stratified_by_dataset(two, tmp_path: Path):
    split(tmp_path / "run", data={"datasets": two}, eval_size=23)
    held_out = read(tmp_path / "run/dataset/eval.jsonl")
    assert Counter(row["question"][0] for row in held_out) == {"a": 20, "b": 3}


def test_split_refuses_a_mixture_and_too_many_strata(two, tmp_path: Path):
    with pytest.raises(ValueError, match=r"datasets\[1\].duplication_factor: split first"):
        split(
            tmp_path / "a",
            data={"datasets": [two[0], {**two[1], "duplication_factor": 2}]},
            eval_size=5,
        )
    with pytest.raises(PostTrainingError, match="stratify_by: more than 1000 different values"):
        split(tmp_path / "b", data={"datasets": two}, eval_size=5, stratify_by="id")


def test_mix_without_one_good_row_names_the_first_bad_one(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text("{\n[]\n")
    data = {"datasets": [{"path": str(path)}], "on_error": "skip"}
    with pytest.raises(PostTrainingError, match=r"x\.jsonl:1: malformed JSON.*not one good row"):
        mix(tmp_path / "run", data=data)


def test_mix_of_a_table_is_read_again_and_what_is_no_json_is_its_rows_fault(tmp_path: Path):
    """Dates become text; a number that is none, and bytes, have no form in JSON."""
    columns = {
        "question": ["a?", "b?", "c?"],
        "answer": ["a", "b", "c"],
        "day": [dt.date(2024, 5, 1)] * 3,
        "score": [0.5, float("nan"), 0.5],
        "hash": [None, None, b"x"],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    data = {"datasets": [{"path": str(tmp_path / "rows.parquet")}], "on_error": "quarantine"}
    mix(tmp_path / "first", data=data)
    rejects = read(tmp_path / "first/rejects.jsonl")
    assert [(each["line"], each["problem"].split(":")[0]) for each in rejects] == [
        (2, "score"),
        (3, "hash"),
    ]
    data = {"datasets": [{"path": str(tmp_path / "first/dataset/rows.jsonl")}]}
    mix(tmp_path / "second", data=data)
    [row] = read(tmp_path / "second/dataset/rows.jsonl")
    assert row["day"] == "2024-05-01"
