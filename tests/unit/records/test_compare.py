import json

import pytest

from post_training.records.compare import compare_runs

LINES = [{"step": 1, "loss": 2.0, "timing": {"s": 1}}, {"step": 2, "loss": 1.0, "timing": {"s": 1}}]


def run(folder, lines=LINES, files=None, metrics=None):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"model/a": "1", "model/b": "2"} if files is None else files
    return {"outputs": {"files": files}, "metrics": metrics or {}}, folder


def verdict(tmp_path, **changes):
    comparison = compare_runs(*run(tmp_path / "one"), *run(tmp_path / "two", **changes))
    return comparison.verdict


def test_compare_equal_runs_are_identical_whatever_the_time(tmp_path):
    slower = [{**line, "timing": {"s": 9}} for line in LINES]
    assert verdict(tmp_path, lines=slower) == "identical: 2 files and 2 lines of metrics"


def test_compare_speed_in_the_record_is_no_difference(tmp_path):
    one = run(tmp_path / "one", metrics={"loss": 2.0, "timing": {"tokens_per_s": 9}})
    two = run(tmp_path / "two", metrics={"loss": 2.0, "timing": {"tokens_per_s": 8}})
    assert compare_runs(*one, *two).difference is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"lines": [LINES[0], {"step": 2, "loss": 1.5}]},
            "differs: metrics.jsonl: step 2: loss is 1.0, then 1.5",
        ),
        ({"lines": LINES[:1]}, "differs: metrics.jsonl has 2 lines, then 1"),
        (
            {"files": {"model/a": "1", "model/b": "3"}},
            "differs: model/b: sha256 is 2, then 3",
        ),
        ({"files": {"model/a": "1"}}, "differs: model/b: sha256 is 2, then absent"),
        ({"metrics": {"rows": 3}}, "differs: metric rows is None, then 3"),
    ],
)
def test_compare_names_the_first_difference(tmp_path, changes, text):
    assert verdict(tmp_path, **changes) == text


def test_compare_nothing_with_nothing_is_no_proof(tmp_path):
    one, two = run(tmp_path / "one", lines=[], files={}), run(tmp_path / "two", lines=[], files={})
    assert compare_runs(*one, *two).verdict == (
        "differs: there are no recorded output files to compare"
    )
