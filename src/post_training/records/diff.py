"""`post-training runs diff A B`: what two runs are, and where what they made parts.

stage, recipe, topology, input, image, code        identity: any of these may change the bits;
                                                   of input folders that are still there, the files
packages, environment, machine                     what the identity rests on
placement                                          never changes them
outcome                                            the first difference, as `reproduce` finds it;
                                                   it must be there where the recipe or an input is
                                                   another
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from post_training.config.recipe import changed_settings
from post_training.core.hashing import fingerprint_files, hash_files
from post_training.core.known_digests import sha256_of_any
from post_training.records.check import check_run
from post_training.records.compare import compare_runs
from post_training.records.machine import portable_environment
from post_training.records.run_record import fingerprints, image_identity, read_whole_record

SAME, DIFFERENT = 0, 4
# Where one of these is another, so should be what comes out.
_CAUSES = ("stage", "recipe", "input")


def print_diffs(run_dirs: Sequence[Path]) -> int:
    """The first of the runs beside each of the others; the exit code, 0 where all are the same."""
    first, *others = run_dirs
    codes = []
    for other in others:
        if others[1:]:
            print(f"== {first} and {other}")
        codes.append(print_diff(first, other))
    return max(codes)


def print_diff(first_dir: Path, second_dir: Path) -> int:
    """A line for each difference; the exit code, 0 where the outcomes are the same."""
    first, second = read_whole_record(first_dir), read_whole_record(second_dir)
    lines = _settings(first, second)
    causes = [text for label, text in lines if label in _CAUSES]
    is_same, outcome = _outcome(first, first_dir, second, second_dir, causes)
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
    lines = []
    for label in described[0]:
        changed = changed_settings(described[0][label], described[1][label])
        lines += [(label, line) for line in changed]
        if label == "input" and changed:
            lines += [(label, line) for line in _changed_files(first, second)]
    return lines


def _changed_files(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """`model.path: chat_template.jinja` for each file, of folders that are what the runs had."""
    lines = []
    for key in sorted(first["inputs"].keys() & second["inputs"].keys()):
        both = [record["inputs"][key] for record in (first, second)]
        folders = [Path(value["path"]) for value in both]
        if both[0]["fingerprint"] == both[1]["fingerprint"] or not all(
            folder.is_dir() for folder in folders
        ):
            continue
        files = [hash_files(folder, sha256_of_any) for folder in folders]
        if all(
            fingerprint_files(found) == value["fingerprint"]
            for found, value in zip(files, both, strict=True)
        ):
            names = sorted(files[0].keys() | files[1].keys())
            lines += [
                f"{key}: {name}" for name in names if files[0].get(name) != files[1].get(name)
            ]
    return lines


def _outcome(
    first: dict[str, Any],
    first_dir: Path,
    second: dict[str, Any],
    second_dir: Path,
    causes: Sequence[str],
) -> tuple[bool, list[str]]:
    """Whether they are the same, and the lines that say it. A verdict is one on bytes: there is
    none where a run is not what it left."""
    lines = [
        f"{folder} is not finished: {record['status']}"
        for record, folder in ((first, first_dir), (second, second_dir))
        if record["outputs"] is None
    ]
    for folder in (first_dir, second_dir):
        found = check_run(folder)
        lines += [f"{folder} is not what the run left: {fault}" for fault in found.faults]
        for remark in found.remarks:
            print(f"note: {folder}: {remark}", file=sys.stderr)
    comparison = compare_runs(first, first_dir, second, second_dir)
    if lines:
        return False, [*lines, *filter(None, [comparison.difference])]
    if comparison.difference and causes:
        more = f" (and {len(causes) - 1} more)" if causes[1:] else ""
        return False, [f"differs as it must: {causes[0]}{more}; first: {comparison.difference}"]
    return comparison.difference is None, [comparison.verdict]
