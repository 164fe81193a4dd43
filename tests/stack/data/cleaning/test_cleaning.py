"""Near duplicates and contaminated rows, against set operations written from their definitions."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.row_files import write_rows
from helpers.worker_functions import ReadingState, read_rows
from post_training.core.errors import UsageError
from post_training.data.cleaning.cleaning import with_cleaning
from post_training.data.cleaning.near_duplicates import (
    SHINGLE,
    find_near_duplicates,
    signature,
)
from post_training.data.cleaning.words import hash_ngrams, texts_of, words_of
from post_training.data.config import SourcesConfig
from post_training.data.formats.columns import ColumnReport, Format
from post_training.data.reading import Reader, open_sources, read_chunks

WORDS = [f"word{number}" for number in range(500)]


def sentence(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def changed(words: list[str], *places: int) -> list[str]:
    return [f"other{n}" if n in places else word for n, word in enumerate(words)]


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[n : n + SHINGLE]) for n in range(len(words) - SHINGLE + 1)}


def jaccard(one: list[str], other: list[str]) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def near(*rows: list[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    with tempfile.TemporaryFile() as file:
        file.write(np.array([signature(row) for row in rows], "<u4").tobytes())
        file.flush()
        return [(each.row, each.kept) for each in find_near_duplicates(file, threshold)]


def row_of(words: list[str]) -> dict[str, str]:
    return {"prompt": " ".join(words), "completion": "Yes."}


def read(
    paths: list[Path], scratch: Path, num_workers: int = 1, **settings: Any
) -> tuple[list[str], list[tuple[str, str]], list[dict[str, Any]], list[str]]:
    """The prompts that are left; reason and problem of the others; records; what was said."""
    config = SourcesConfig(
        datasets=[{"path": path} for path in paths], num_workers=num_workers, **settings
    )
    sources, formats = open_sources(config)
    said: list[str] = []
    reader = with_cleaning(Reader(config, formats), sources, scratch, said.append)
    report, left, bad = ColumnReport(formats), [], []
    for chunk in read_chunks(read_rows, ReadingState(reader), sources, config, lambda _: 0, report):
        left += [row.messages[0].content for row in chunk.rows]
        bad += [(each.bad.reason, each.bad.problem) for each in chunk.rejected]
    return left, bad, [report.record(index) for index in range(len(paths))], said


def test_hashes_of_ngrams_are_equal_where_the_words_are():
    words = ["a", "b", "a", "b", "c"]
    first, second, third, fourth = hash_ngrams(words, 2).tolist()
    assert first == third
    assert len({first, second, fourth}) == 3
    assert hash_ngrams(words, 6).tolist() == []


@pytest.mark.parametrize("num_changed", [0, 1, 2, 4, 8])
def test_signatures_estimate_the_similarity_of_sets(num_changed: int):
    errors = []
    for seed in range(40):
        one = sentence(seed)
        other = changed(one, *random.Random(seed).sample(range(60), num_changed))
        errors.append((signature(one) == signature(other)).mean() - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.03  # five standard errors of 40 estimates from 120 minima
    assert np.max(np.abs(errors)) < 0.2


def test_rows_are_joined_by_similarity_alone():
    base = sentence(1)
    rows = [base, sentence(2), changed(base, 0), base, changed(base, *range(0, 60, 4))]
    assert near(*rows) == [(2, 0), (3, 0)]
    assert near(sentence(3), sentence(4), sentence(5)) == []


def test_chain_of_near_rows_keeps_its_first():
    first = sentence(6)
    second = changed(first, 0, 1)
    third = changed(second, 57, 58, 59)
    assert jaccard(first, second) > 0.85
    assert near(third, second, first)[-1][1] == 0


def test_rows_without_words_or_with_few_are_no_duplicates_of_each_other():
    assert near([], [], ["yes"], ["no"]) == []
    assert near(["yes"], ["yes"]) == [(1, 0)]


def test_signs_tell_sums_apart_and_scripts_without_spaces_have_words():
    assert words_of("3 + 4 - Äpfel!", signs=True) == ["3", "+", "4", "-", "äpfel", "!"]
    assert words_of("Äpfel, 3!", signs=False) == ["äpfel", "3"]
    assert words_of("湖は深い。", signs=False) == ["湖", "は", "深", "い"]


def test_system_messages_roles_and_tools_say_nothing_of_the_row():
    value = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        ],
        "tools": "[]",
        "source": "ours",
    }
    found = Format("messages", {"messages": "messages"}, optional={"tools": ("tools",)})
    assert list(texts_of(value, found)) == ["Rain?"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_near_duplicates_are_left_out_with_their_match_by_source(tmp_path: Path, num_workers: int):
    base = sentence(7)
    first = write_rows(tmp_path / "a.jsonl", [row_of(base), row_of(sentence(8))])
    second = write_rows(tmp_path / "b.jsonl", [row_of(sentence(9)), row_of(changed(base, 3))])
    left, bad, records, said = read(
        [first, second], tmp_path, num_workers, deduplicate="near", on_error="fail"
    )
    assert left == [" ".join(sentence(seed)) for seed in (7, 8, 9)]
    [(reason, problem)] = bad
    assert reason == "near-duplicate"
    assert problem.startswith(f"nearly the same as {first}:1 (similarity 0.8")
    assert "num_cleaned" not in records[0]
    assert records[1]["num_cleaned"] == {"near-duplicate": 1}
    assert said == ["data: near duplicates of earlier rows: 1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_near_similarity_decides(tmp_path: Path):
    base = sentence(10)
    path = write_rows(tmp_path / "a.jsonl", [row_of(base), row_of(changed(base, 3))])
    settings = {"deduplicate": "near", "near_similarity": 0.97}
    assert len(read([path], tmp_path, **settings)[0]) == 2


def test_contaminated_rows_are_left_out_with_what_both_say(tmp_path: Path):
    asked = sentence(11, 20)
    benchmark = tmp_path / "test.jsonl"
    write_rows(benchmark, [{"q": "too short"}, {"q": {"text": " ".join(asked)}, "a": 5}])
    words = sentence(12, 10) + asked[2:15] + sentence(13, 5)
    words[12] = f"{words[12].upper()}!"
    path = write_rows(
        tmp_path / "a.jsonl",
        [row_of(words), row_of(sentence(12, 10) + asked[2:14]), row_of(sentence(14))],
    )
    left, bad, [record], said = read([path], tmp_path, decontaminate={"against": [benchmark]})
    assert len(left) == 2
    assert bad == [
        ("contaminated", f"says 13 words of test.jsonl:2: '{' '.join(asked[2:15])}'"),
    ]
    assert record["num_cleaned"] == {"contaminated": 1}
    assert said == [
        "data: compared with the 2 rows of test.jsonl, of which 1 can't be found: no text of 13 "
        "words"
    ]
    shorter = {"against": [benchmark], "ngram": 12}
    assert len(read([path], tmp_path, decontaminate=shorter)[0]) == 1


def test_benchmark_that_is_not_there_is_told(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [row_of(sentence(1))])
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        read([path], tmp_path, decontaminate={"against": [tmp_path / "none.jsonl"]})


def test_rows_that_are_bad_anyway_keep_their_verdict(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [row_of(sentence(1)), {"prompt": "", "completion": 3}])
    _, bad, _, _ = read([path], tmp_path, deduplicate="near", on_error="skip")
    assert [reason for reason, _ in bad] == ["empty"]


def test_damaged_text_is_no_crash(tmp_path: Path):
    rows = [{"prompt": text, "completion": "x"} for text in ("\udc00 " * 20, "😀 " * 20, "ก" * 50)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))
    left, bad, _, _ = read([path], tmp_path, deduplicate="near", on_error="skip")
    assert len(left) + len(bad) == 3
