"""Write demonstrations.jsonl and problems.jsonl: word problems with worked answers, in the columns
of GSM8K, in this folder.

    python make_problems.py

Every problem takes two steps. The answers of problems.jsonl are right; half of the demonstrations
are careless: they stop after the first step and give its result. No question is in both files. The
same on every machine: everything is drawn from a fixed seed.
"""

import json
import random
from pathlib import Path

NUM_DEMONSTRATIONS, NUM_PROBLEMS, LARGEST = 1500, 500, 6
CARELESS_SHARE = 0.5
NAMES = ("Aisha", "Bruno", "Chen", "Dara", "Elif", "Fritz")
THINGS = ("apples", "books", "coins", "pens")


def problem(draw: random.Random, careless_share: float, largest: int) -> dict[str, str]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b, c = (draw.randint(2, largest) for _ in range(3))
    if draw.random() < 0.5:
        question = f"{name} has {a} {thing}, buys {b} more, then {c} more. How many now?"
        steps = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"]
    else:
        a += c
        question = f"{name} has {a} {thing}, buys {b} more, then gives {c} away. How many now?"
        steps = [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"]
    if draw.random() < careless_share:
        steps = steps[:1]
    result = steps[-1].rpartition(" ")[2]
    return {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


def distinct_problems(
    num_demonstrations: int, num_problems: int, largest: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Demonstrations, and problems with right answers. largest: of what is had, bought or given."""
    draw = random.Random(0)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num_demonstrations + num_problems:
        careless_share = CARELESS_SHARE if len(rows) < num_demonstrations else 0.0
        row = problem(draw, careless_share, largest)
        rows.setdefault(row["question"], row)
    ordered = list(rows.values())
    return ordered[:num_demonstrations], ordered[num_demonstrations:]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    demonstrations, problems = distinct_problems(NUM_DEMONSTRATIONS, NUM_PROBLEMS, LARGEST)
    folder = Path(__file__).parent
    write(folder / "demonstrations.jsonl", demonstrations)
    write(folder / "problems.jsonl", problems)


if __name__ == "__main__":
    main()
