"""`post-training runs diff A B`: what two runs are, and where what they made parts.

stage, recipe, topology, input, image, code        identity: any of these may change the bits
packages, environment, machine                     what the identity rests on
placement                                          never changes them
outcome                                            the first difference, as `reproduce` finds it
"""

import sys
from pathlib import Path
from typing import Any

from post_training.config.recipe import changed_settings
from post_training.records.compare import compare_runs
from post_training.records.machine import portable_environment
from post_training.records.run_record import (
    fingerprints,
    image_identity,
    is_edited,
    read_record,
)
from post_training.records.show import EDITED

SAME, DIFFERENT = 0, 4


def print_diff(first_dir: Path, second_dir: Path) -> int:
    """A line for each difference; the exit code, 0 where the outcomes are the same."""
    first, second = read_record(first_dir), read_record(second_dir)
    for record, folder in ((first, first_dir), (second, second_dir)):
        if is_edited(record):
            print(f"warning: {folder}: {EDITED}", file=sys.stderr)
    lines = _settings(first, second)
    is_same, outcome = _outcome(first, first_dir, second, second_dir)
    for label, text in [*lines, *(("outcome", text) for text in outcome)]:
        print(f"{label:12} {text}")
    return SAME if is_same else DIFFERENT


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str]]:
    described = [
        {
            "stage": {"stage": record["stage"]},
            "recipe": record["recipe"],
            "topology": record["topology"],
            "input": fingerprints(record["inputs"]),
            "image": image_identity(record["image"]),
            "code": record["code"],
            "packages": record["packages"],
            "environment": portable_environment(record["environment"]),
            "machine": record["machine"],
            "placement": record["placement"],
        }
        for record in (first, second)
    ]
    return [
        (label, line)
        for label in described[0]
        for line in changed_settings(described[0][label], described[1][label])
    ]


def _outcome(
    first: dict[str, Any], first_dir: Path, second: dict[str, Any], second_dir: Path
) -> tuple[bool, list[str]]:
    comparison = compare_runs(first, first_dir, second, second_dir)
    unfinished = [
        f"{folder} is not finished: {record['status']}"
        for record, folder in ((first, first_dir), (second, second_dir))
        if record["outputs"] is None
    ]
    if unfinished:
        return False, [*unfinished, *filter(None, [comparison.difference])]
    return comparison.difference is None, [comparison.verdict]
