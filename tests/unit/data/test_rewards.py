"""Reward functions from files of the user's."""

from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.config import FunctionLimits
from post_training.data.rewards import find_reward

EXACT = """\
from post_training.data.rewards import register_reward

@register_reward("exact")
def exact(answer, row):
    expected = row["original_metadata"]["answer"]
    return answer == expected
"""


def judge(path: Path, answers: list[list[str]], rows: list[dict], name: str = "exact") -> list:
    reward = find_reward(name, [path], FunctionLimits())
    return list(reward(answers, rows, "row {}".format))


def test_reward_function_that_raises_names_its_file_and_line(tmp_path: Path):
    path = tmp_path / "exact_match.py"
    path.write_text(EXACT)
    good = {"original_metadata": {"answer": "4"}}
    first, bad, last = judge(
        path, [["4", "5"], ["4"], ["5"]], [good, {"original_metadata": {}}, good]
    )
    assert (first, last) == ([1.0, 0.0], [0.0])
    assert (bad.reason, bad.problem) == ("failed", "exact_match.py:5: KeyError: 'answer'")


def test_reward_function_that_changes_its_row_changes_a_copy(tmp_path: Path):
    path = tmp_path / "greedy.py"
    path.write_text(EXACT.replace("return", "row.clear()\n    return"))
    rows = [{"original_metadata": {"answer": "4"}}] * 2
    assert judge(path, [["4", "4"], ["4"]], rows) == [[1.0, 1.0], [1.0]]
    assert rows[0] == {"original_metadata": {"answer": "4"}}


@pytest.mark.parametrize("value", ["'good'", "float('nan')", "10**400", "None"])
def test_reward_that_is_no_finite_number_ends_the_run(value: str, tmp_path: Path):
    path = tmp_path / "exact_match.py"
    path.write_text(EXACT.replace("answer == expected", value))
    with pytest.raises(PostTrainingError, match="must return a finite number") as error:
        judge(path, [["4"]], [{"original_metadata": {"answer": "4"}}])
    assert str(error.value).startswith("row 0: reward 'exact' of exact_match.py must return")


def test_reward_file_that_marks_nothing_is_refused_with_the_line_to_import(tmp_path: Path):
    path = tmp_path / "unmarked.py"
    path.write_text("def exact(answer, row): return 1\n")
    with pytest.raises(UsageError, match="registers no reward") as error:
        find_reward("exact", [path], FunctionLimits())
    assert "from post_training.data.rewards import register_reward" in str(error.value.hint)


def test_reward_that_is_marked_without_a_name_is_refused(tmp_path: Path):
    path = tmp_path / "unnamed.py"
    path.write_text(EXACT + EXACT.replace('("exact")', "").replace("def exact", "def other"))
    with pytest.raises(UsageError) as error:
        find_reward("exact", [path], FunctionLimits())
    assert str(error.value) == (f"{path}: @register_reward needs a name: @register_reward('NAME')")
