"""The problems of reproducibility/arithmetic-preference: what their script writes, and right."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

EXPERIMENT = Path(__file__).parents[3] / "reproducibility/arithmetic-preference"
FILES = ("demonstrations.jsonl", "problems.jsonl")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXPERIMENT / name).read_text().splitlines()]


def is_careless(row: dict[str, str]) -> bool:
    """Errors: AssertionError for a wrong step, or another result than that of the last step."""
    steps = re.findall(r"(\d+) ([-+]) (\d+) = (\d+)", row["answer"])
    for a, sign, b, result in steps:
        assert int(a) + int(f"{sign}{b}") == int(result), row
    assert row["answer"].endswith(f"\n#### {steps[-1][3]}")
    return len(steps) == 1


def test_preference_problems_are_what_their_script_writes(tmp_path: Path):
    script = shutil.copy(EXPERIMENT / "make_problems.py", tmp_path)
    subprocess.run([sys.executable, script], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXPERIMENT / name).read_bytes()


def test_preference_problems_are_right_and_half_of_the_demonstrations_are_careless():
    demonstrations, problems = map(rows, FILES)
    assert not any(map(is_careless, problems))
    assert 0.45 < sum(map(is_careless, demonstrations)) / len(demonstrations) < 0.55
    questions = [row["question"] for row in (*demonstrations, *problems)]
    assert len(set(questions)) == len(questions) == 2000
