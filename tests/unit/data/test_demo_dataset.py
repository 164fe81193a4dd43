"""The demo's data: what its script writes, and right."""

import json
import re
import subprocess
import sys
from pathlib import Path

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.sources.open import read_objects

DEMO = Path(__file__).parents[3] / "reproducibility" / "demo"


def test_demo_dataset_is_what_its_script_writes():
    written = subprocess.run(
        [sys.executable, DEMO / "make_arithmetic.py"], capture_output=True, check=True
    ).stdout
    assert written == (DEMO / "arithmetic.jsonl").read_bytes()


def test_demo_dataset_answers_are_right():
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    rows = [json.loads(line) for line in (DEMO / "arithmetic.jsonl").read_text().splitlines()]
    assert len(rows) == 600
    for row in rows:
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["answer"])
        assert equations
        for a, operation, b, result in equations:
            assert operations[operation](int(a), int(b)) == int(result), row
        assert row["answer"].endswith(f"\n#### {equations[-1][3]}")


def test_demo_dataset_is_read_as_questions_and_answers():
    path = DEMO / "arithmetic.jsonl"
    rows = list(read_objects(path))
    found = recognise(rows[0], DatasetConfig(path=path), "arithmetic.jsonl:1")
    assert found.describe() == "prompt_completion (question, answer)"
    read = [parse(row, found, train_on="all_turns", train_on_thoughts=True) for row in rows]
    assert [each[0].messages[-1].content for each in read] == [row["answer"] for row in rows]
