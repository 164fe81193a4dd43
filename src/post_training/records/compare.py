"""Compare two finished runs that should be equal: the first thing that differs, or nothing.

Metrics come first (they say when it began), then files. What holds times or paths is left out:
`timing` in metrics.jsonl and in the record's metrics, and the files that the record lists as
unstable.
"""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Comparison:
    """difference: None when everything compared is equal. num_*: how much was compared."""

    difference: str | None
    num_files: int
    num_metric_lines: int

    @property
    def verdict(self) -> str:
        if self.difference:
            return f"differs: {self.difference}"
        metrics = f" and {self.num_metric_lines} lines of metrics" if self.num_metric_lines else ""
        return f"identical: {self.num_files} files{metrics}"


def compare_runs(
    first: dict[str, Any], first_dir: Path, second: dict[str, Any], second_dir: Path
) -> Comparison:
    """Compare records and metrics; the records' hashes stand for the files.

    Returns a difference, too, when there is nothing to compare.
    """
    ours, theirs = first["outputs"]["files"], second["outputs"]["files"]
    our_lines, their_lines = _read_metrics(first_dir), _read_metrics(second_dir)
    difference = (
        _first_metric_difference(our_lines, their_lines)
        or _first_file_difference(ours, theirs)
        or _first_final_difference(first["metrics"], second["metrics"])
        or (None if ours else "there are no recorded output files to compare")
    )
    return Comparison(difference, len(ours), len(our_lines))


def _read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / METRICS_NAME
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


def _first_metric_difference(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> str | None:
    for number, (one, other) in enumerate(zip_longest(ours, theirs), 1):
        if one is None or other is None:
            return f"{METRICS_NAME} has {len(ours)} lines, then {len(theirs)}"
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                place = f"step {one['step']}" if "step" in one else f"line {number}"
                return f"{METRICS_NAME}: {place}: {key} is {one.get(key)}, then {other.get(key)}"
    return None


def _first_file_difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return (
                f"{name}: sha256 is {ours.get(name, 'absent')}, then {theirs.get(name, 'absent')}"
            )
    return None


def _first_final_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    for key in sorted((ours.keys() | theirs.keys()) - {"timing"}):
        if ours.get(key) != theirs.get(key):
            return f"metric {key} is {ours.get(key)}, then {theirs.get(key)}"
    return None
