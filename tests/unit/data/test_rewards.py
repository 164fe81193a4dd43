"""Reward functions from files of the user's."""

from pathlib import Path

import pytest

from post_training.data.rewards import find_reward
from post_training.data.rows import BadRow

EXACT = """\
from post_training.data.rewards import register_reward

@register_reward("exact")
def exact(answer, row):
    expected = row["original_metadata"]["answer"]
    return answer == expected
"""


def test_reward_function_that_raises_names_its_file_and_line(tmp_path: Path):
    path = tmp_path / "exact_match.py"
    path.write_text(EXACT)
    reward = find_reward("exact", [path])
    assert reward("4", {"original_metadata": {"answer": "4"}}) == 1.0
    with pytest.raises(BadRow) as bad:
        reward("4", {"original_metadata": {}})
    fault = ("failed", "exact_match.py:5: KeyError: 'answer'")
    assert (bad.value.reason, bad.value.problem) == fault
