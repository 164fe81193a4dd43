"""What `experiment check` makes of an experiment's runs beside the expected ones."""

import copy

import pytest

from post_training.reproduce.experiment import grade, summary

RECORD = {
    "image": {"input_hash": "i"},
    "machine": {"architecture": "x86_64", "processor": "fast", "accelerators": {},
                "instructions": ["avx2", "avx512f"], "host": "a"},
    "outputs": {"artifacts": {"model": {"path": "model", "fingerprint": "f"}}},
    "metrics": {"loss": 2.0, "small": 0.01, "num_steps": 10, "timing": {"step_s": 1.0}},
}  # fmt: skip


@pytest.fixture
def expected():
    return {"tolerance": 0.02, **summary({"init": RECORD, "train": RECORD})}


def other(image=None, machine=None, **figures) -> dict:
    """The same two runs, `train` with another model and these figures."""
    record = copy.deepcopy(RECORD)
    record["outputs"]["artifacts"]["model"]["fingerprint"] = "g"
    record["metrics"] |= figures
    record["machine"] |= machine or {}
    found = summary({"init": RECORD, "train": record})
    found["machine"] = summary({"train": record})["machine"]
    return found | ({"image_input_hash": image} if image else {})


def test_grade_same_artifacts_are_identical_in_whatever_image_and_time(expected):
    again = copy.deepcopy(RECORD) | {"image": {"input_hash": "j"}}
    again["metrics"]["timing"]["step_s"] = 5.0
    code, verdict, notes = grade(expected, summary({"init": again, "train": again}))
    assert (code, verdict) == (0, "identical: 2 artifacts of 2 runs")
    assert notes == ["image_input_hash was i, here it is j"]


def test_grade_expected_figures_that_do_not_tell_the_instructions_forgive_nothing(expected):
    del expected["machine"]["instructions"]
    assert grade(expected, other())[0] == 4


@pytest.mark.parametrize(
    ("found", "code", "verdict"),
    [
        (other(), 4, "differs: train: other artifacts, in the same image"),
        (other(image="j", loss=2.03), 3, "equivalent: every figure is within 0.02 of what was "
         "expected; other bits from train on"),
        (other(machine={"processor": "slow"}, loss=1.97), 3, "equivalent: every figure is within "
         "0.02 of what was expected; other bits from train on"),
        (other(machine={"instructions": ["avx2"]}, loss=1.97), 3, "equivalent: every figure is "
         "within 0.02 of what was expected; other bits from train on"),
        (other(image="j", loss=2.05), 4, "differs: train: loss is 2.05, 2 was expected"),
        (other(image="j", small=0.0105), 4, "differs: train: small is 0.0105, 0.01 was expected"),
        (other(image="j", loss=float("nan")), 4, "differs: train: loss is nan, 2 was expected"),
        (other(image="j", num_steps=9), 4, "differs: train: num_steps is 9, 10 was expected"),
        (summary({"train": RECORD}), 4, "differs: other runs than expected: init"),
    ],
)  # fmt: skip
def test_grade_other_artifacts_are_forgiven_elsewhere_and_within_tolerance(
    expected, found, code, verdict
):
    assert grade(expected, found)[:2] == (code, verdict)


def test_grade_missing_figure_is_a_difference(expected):
    found = other(image="j")
    del found["runs"]["train"]["figures"]["loss"]
    assert grade(expected, found)[:2] == (4, "differs: train: no figure loss")
