"""Write arithmetic.jsonl: word problems with worked answers, in the columns of GSM8K.

    python make_arithmetic.py > arithmetic.jsonl

The same on every machine: the order and the numbers are drawn from a fixed seed.
"""

import json
import random
import sys

NUM_ROWS = 600
NAMES = ("Aisha", "Bruno", "Chen", "Dara", "Elif", "Fritz", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "pens", "stamps")


def problem(draw: random.Random) -> dict[str, str]:
    name, friend = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    a, b, c = draw.randint(2, 20), draw.randint(2, 12), draw.randint(2, 9)
    kind = draw.randrange(5)
    if kind == 0:
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?"
        steps, result = [f"{name} has {a} + {b} = {a + b} {thing}."], a + b
    elif kind == 1:
        total = a + b
        question = (
            f"{name} has {total} {thing} and gives {b} to {friend}. "
            f"How many {thing} does {name} have left?"
        )
        steps, result = [f"{name} has {total} - {b} = {a} {thing} left."], a
    elif kind == 2:
        question = (
            f"{name} fills {c} boxes with {b} {thing} each. How many {thing} are in the boxes?"
        )
        steps, result = [f"The boxes hold {c} * {b} = {c * b} {thing}."], c * b
    elif kind == 3:
        question = (
            f"{name} shares {c * b} {thing} equally among {c} friends. "
            f"How many {thing} does each friend get?"
        )
        steps, result = [f"Each friend gets {c * b} / {c} = {b} {thing}."], b
    else:
        question = (
            f"{name} fills {c} boxes with {b} {thing} each and finds {a} more. "
            f"How many {thing} does {name} have?"
        )
        steps = [
            f"The boxes hold {c} * {b} = {c * b} {thing}.",
            f"{name} has {c * b} + {a} = {c * b + a} {thing}.",
        ]
        result = c * b + a
    return {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


def main() -> None:
    draw = random.Random(0)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < NUM_ROWS:
        row = problem(draw)
        rows.setdefault(row["question"], row)
    for row in rows.values():
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
