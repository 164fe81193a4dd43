import json

import pytest

from post_training.core.errors import UsageError
from post_training.records.compare import compare_runs

LINES = [{"step": 1, "loss": 2.0, "timing": {"s": 1}}, {"step": 2, "loss": 1.0, "timing": {"s": 1}}]


STEPS = [{"step": n, "rows": f"{n:010x}", "loss": 1 / n, "grad_norm": 0.5} for n in (1, 2, 3)]


def run(folder, lines=LINES, files=None, metrics=None, steps=STEPS):
    folder.mkdir()
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss": 0.25}, "step 2: the same rows, loss is 0.5, then 0.25"),
        ({"rows": "f", "loss": 0.25}, "step 2: other rows, loss is 0.5, then 0.25"),
        ({"grad_norm": 0.1}, "step 2: the same rows, grad_norm is 0.5, then 0.1"),
    ],
)
def test_compare_first_step_that_differs_comes_before_what_follows_from_it(tmp_path, change, text):
    steps = [STEPS[0], {**STEPS[1], **change}, {**STEPS[2], "loss": 9.0}]
    files = {"model/a": "1", "model/b": "3"}
    assert verdict(tmp_path, steps=steps, files=files) == f"differs: {text}"


@pytest.mark.parametrize("number", [2, 4])
def test_compare_run_of_more_or_fewer_equal_steps_is_told(tmp_path, number):
    steps = [*STEPS, {"step": 4, "rows": "4", "loss": 0.25, "grad_norm": 0.5}][:number]
    assert verdict(tmp_path, steps=steps) == f"differs: 3 steps, then {number}"


def test_compare_data_that_differs_is_told_with_the_first_step_that_does(tmp_path):
    files = [{"data/rows.bin": name, "checkpoints/w": name} for name in "12"]
    one = run(tmp_path / "one", files=files[0])
    two = run(tmp_path / "two", files=files[1])
    assert compare_runs(*one, *two).difference == "data/rows.bin: sha256 is 1, then 2"
    (tmp_path / "two/steps.jsonl").write_text(json.dumps({**STEPS[0], "loss": 3.0}) + "\n")
    assert compare_runs(*one, *two).difference == (
        "step 1: the same row numbers of other data, loss is 1.0, then 3.0; "
        "data/rows.bin: sha256 is 1, then 2"
    )


def test_compare_settings_of_the_data_that_differ_are_named_and_no_other_rows(tmp_path):
    runs = []
    for seed, name in ((1, "one"), (2, "two")):
        steps = [{**STEPS[0], "rows": f"{seed:010x}", "loss": 1 / seed}]
        runs += run(tmp_path / name, files={"data/prepared.json": name}, steps=steps)
        (tmp_path / name / "data").mkdir()
        record = {"identity": {"seed": seed, "rows": [1, 2]}, "counts": {"num_rows": 3}}
        (tmp_path / name / "data/prepared.json").write_text(json.dumps(record))
    assert compare_runs(*runs).difference == (
        "step 1: other rows, loss is 1.0, then 0.5; data/prepared.json: identity.seed is 1, then 2"
    )


@pytest.mark.parametrize("line", ["{", "[]", "5", '{"step": 1}\0'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_compare_damaged_line_is_one_clear_line(tmp_path, name, line):
    runs = [*run(tmp_path / "one"), *run(tmp_path / "two")]
    path = tmp_path / "two" / name
    path.write_text(path.read_text() + line + "\n")
    number = {"metrics.jsonl": 3, "steps.jsonl": 4}[name]
    with pytest.raises(
        UsageError, match=rf"two/{name}:{number}: not a line of figures: it is damaged"
    ):
        compare_runs(*runs)


@pytest.mark.parametrize("damage", [b"", b"other bytes, of no tensors", b"\xff" * 64])
def test_compare_weights_that_are_none_any_more_are_told_by_their_sha256(
    tmp_path, write_tensors, damage
):
    files = [{"model/model.safetensors": name} for name in "12"]
    runs = []
    for name, its_files in zip(("one", "two"), files, strict=True):
        runs += run(tmp_path / name, files=its_files)
        (tmp_path / name / "model").mkdir()
        write_tensors(tmp_path / name / "model/model.safetensors", head=("F32", [1], [1.0]))
    (tmp_path / "two/model/model.safetensors").write_bytes(damage)
    assert compare_runs(*runs).difference == "model/model.safetensors: sha256 is 1, then 2"


def test_compare_step_that_differs_is_told_with_the_first_weights_that_do(tmp_path, write_tensors):
    names = [f"checkpoints/checkpoint-{step}/model.safetensors" for step in (5, 10)]
    runs = []
    for index, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        steps = [STEPS[0], {**STEPS[1], "loss": 0.5 + index}]
        runs += run(folder, steps=steps, files={name: str(index) for name in names})
        for name in names:
            (folder / name).parent.mkdir(parents=True)
            write_tensors(folder / name, head=("F32", [1], [float(index)]))
    assert compare_runs(*runs).difference == (
        "step 2: the same rows, loss is 0.5, then 1.5; "
        "checkpoints/checkpoint-5/model.safetensors: head: element 0 is 0.0, then 1.0"
    )


def test_compare_deviation_is_relative_and_the_largest(tmp_path):
    close = [{"step": 1, "loss": 2.0}, {"step": 2, "eval": {"loss": 1.0}}]
    far = [{"step": 1, "loss": 2.002}, {"step": 2, "eval": {"loss": 1.1}}]
    one, two = run(tmp_path / "one", lines=close), run(tmp_path / "two", lines=far)
    assert compare_runs(*one, *two).deviation == pytest.approx(0.1 / 1.1)
    three = run(tmp_path / "three", lines=[{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}])
    assert compare_runs(*one, *three).deviation is None


def test_compare_nothing_with_nothing_is_no_proof(tmp_path):
    one, two = run(tmp_path / "one", lines=[], files={}), run(tmp_path / "two", lines=[], files={})
    assert compare_runs(*one, *two).verdict == (
        "differs: there are no recorded output files to compare"
    )
