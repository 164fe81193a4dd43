"""What the rows of an annotation stage hold: distributions of figures, and examples.

A distribution is told by its mean and its quantiles (the nearest rank: a value that is there), and
by a histogram of 20 equal bins between its least and its largest value.
"""

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The quantiles that are told: their names and shares.
QUANTILES = {
    "least": 0.0,
    "5%": 0.05,
    "25%": 0.25,
    "median": 0.5,
    "75%": 0.75,
    "95%": 0.95,
    "largest": 1.0,
}
_NUM_BINS = 20
ROWS = "dataset/rows.jsonl"
PAIRS_REPORT = "report/report.json"
_NUM_EXAMPLES = 3
# Of a text that is shown.
_MOST_CHARACTERS = 1200
# {key of a branch: what it is called}; any other number in a branch is told under its own name.
_NAMES = {
    "completion_length": "completion length (tokens)",
    "completion_ref_logprob": "log-probability of the completion under the reference (nats)",
    "completion_logprob": "log-probability of the completion (nats)",
}


def describe_distribution(values: array) -> dict[str, Any]:
    """number, mean, the quantiles, and histogram: {from, to, counts of the bins}."""
    ordered = sorted(values)
    last = len(ordered) - 1
    quantiles = {name: ordered[round(share * last)] for name, share in QUANTILES.items()}
    least, largest = ordered[0], ordered[-1]
    width = (largest - least) / _NUM_BINS
    counts = [0] * _NUM_BINS
    for value in ordered:
        counts[min(int((value - least) / width), _NUM_BINS - 1) if width else 0] += 1
    return {
        "number": len(ordered),
        "mean": sum(ordered) / len(ordered),
        **quantiles,
        "histogram": {"from": least, "to": largest, "counts": counts},
    }


def format_number(value: float) -> str:
    """`12,345`; four digits of what is no whole number."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@dataclass(frozen=True)
class Example:
    """One branch. reward: what it was chosen by."""

    prompt: str
    completion: str
    reward: float
    reward_name: str


@dataclass(frozen=True)
class Annotations:
    """num_rows, num_branches: that were read; is_whole: whether these are all. distributions: as
    `describe_distribution`, by name. finish_reasons: branches by why they ended. best, worst:
    branches by reward, the best and the worst first."""

    num_rows: int
    num_branches: int
    is_whole: bool
    distributions: dict[str, dict[str, Any]]
    finish_reasons: dict[str, int]
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)


def read_pair_figures(run_dir: Path) -> dict[str, Any] | None:
    """What `select` says of its pairs; None where there is none, or it is damaged."""
    try:
        found = json.loads((run_dir / PAIRS_REPORT).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    is_whole = isinstance(found, dict) and isinstance(found.get("distributions"), dict)
    return found if is_whole else None


def read_annotations(run_dir: Path, most_bytes: int) -> Annotations | None:
    """Of the first `most_bytes` of the rows; None where the run has no rows with branches."""
    path = run_dir / ROWS
    if not path.is_file():
        return None
    values: dict[str, array] = {}
    finish_reasons: Counter[str] = Counter()
    examples: list[Example] = []
    num_rows = num_branches = num_bytes = 0
    is_whole = True
    with open(path, "rb") as file:
        for text in file:
            num_bytes += len(text)
            if num_bytes > most_bytes and num_rows:
                is_whole = False
                break
            row = _row(text)
            if row is None:
                return None
            num_rows += 1
            of_row: list[Example] = []
            for branch in row["conversation_branches"]:
                num_branches += 1
                reason = branch.get("finish_reason")
                if reason is not None:
                    finish_reasons[str(reason)] += 1
                figures = _figures_of(branch)
                for name, value in figures.items():
                    values.setdefault(name, array("d")).append(value)
                rewards = {name: v for name, v in figures.items() if name.startswith("reward")}
                if rewards:
                    name, reward = next(iter(rewards.items()))
                    of_row.append(Example(_prompt(row), _completion(branch), reward, name))
            # Of each prompt its best and its worst: examples of one prompt alone would say little.
            of_row.sort(key=lambda example: -example.reward)
            examples += [of_row[0], of_row[-1]] if of_row[1:] else of_row
            if len(examples) > 64 * _NUM_EXAMPLES:
                examples = _extremes(examples)
    if not num_branches:
        return None
    ordered = _extremes(examples)
    # Where there are few, none is both among the best and the worst.
    num_worst = min(_NUM_EXAMPLES, len(ordered) // 2)
    return Annotations(
        num_rows,
        num_branches,
        is_whole,
        {name: describe_distribution(found) for name, found in sorted(values.items())},
        dict(finish_reasons.most_common()),
        ordered[: min(_NUM_EXAMPLES, len(ordered) - num_worst)],
        ordered[::-1][:num_worst],
    )


def _row(text: bytes) -> dict[str, Any] | None:
    """None for what is no row with branches: rows of `mix` and `split`, for example."""
    try:
        row = json.loads(text)
        branches = row["conversation_branches"]
    except (ValueError, LookupError, TypeError):
        return None
    is_right = isinstance(branches, list) and all(isinstance(each, dict) for each in branches)
    return row if is_right else None


def _figures_of(branch: dict[str, Any]) -> dict[str, float]:
    """Every number of a branch; those within `rewards` one by one."""
    figures: dict[str, float] = {}
    for key, value in branch.items():
        if key == "rewards" and isinstance(value, dict):
            named = value.items()
            figures |= {f"reward: {name}": float(v) for name, v in named if _is_number(v)}
        elif key == "rewards" and isinstance(value, list):
            found = enumerate(value)
            figures |= {f"reward {i}": float(v) for i, v in found if _is_number(v)}
        elif _is_number(value):
            figures[_NAMES.get(key, key.replace("_", " "))] = float(value)
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _extremes(examples: list[Example]) -> list[Example]:
    """The best, and the worst that are none of them, from best to worst; of other prompts each."""
    ordered = sorted(examples, key=lambda example: -example.reward)
    best = _of_different_prompts(ordered)
    worst = _of_different_prompts([each for each in reversed(ordered) if each not in best])
    return best + worst[::-1]


def _of_different_prompts(examples: list[Example]) -> list[Example]:
    found: dict[str, Example] = {}
    for example in examples:
        if len(found) < _NUM_EXAMPLES:
            found.setdefault(example.prompt, example)
    return list(found.values())


def _prompt(row: dict[str, Any]) -> str:
    return _cut(_text_of(row.get("initial_prompt")))


def _completion(branch: dict[str, Any]) -> str:
    messages = branch.get("messages")
    return _cut(_text_of(messages if messages else branch.get("completion")))


def _text_of(value: Any) -> str:
    """The text in a message, in a list of messages, or in a string."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text_of, value)))
    if isinstance(value, dict):
        for key in ("content", "text", "parts", "value"):
            if key in value and (text := _text_of(value[key])):
                return text
    return ""


def _cut(text: str) -> str:
    """At most _MOST_CHARACTERS, and how many were left out."""
    left = len(text) - _MOST_CHARACTERS
    return text if left <= 0 else f"{text[:_MOST_CHARACTERS]} … ({left:,} characters more)"
