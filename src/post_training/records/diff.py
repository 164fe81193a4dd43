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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from post_training.config.recipe import changed_settings
from post_training.core.hashing import fingerprint_files, hash_files
from post_training.core.known_digests import sha256_of_any
from post_training.records.check import Check, check_run
from post_training.records.compare import compare_runs
from post_training.records.machine import portable_environment
from post_training.records.run_record import fingerprints, image_identity, read_whole_record

SAME, DIFFERENT = 0, 4
# Where one of these is another, so should be what comes out.
_CAUSES = ("stage", "recipe", "input")


@dataclass(frozen=True)
class _Run:
    folder: Path
    record: dict[str, Any]

    @cached_property
    def check(self) -> Check:
        """All of its bytes are read: once, however many runs it stands beside."""
        return check_run(self.folder)


def print_diffs(run_dirs: Sequence[Path]) -> int:
    """The first of the runs beside each of the others; the exit code, 0 where all are the same."""
    first, *others = [_Run(folder, read_whole_record(folder)) for folder in run_dirs]
    codes = []
    for other in others:
        if others[1:]:
            print(f"== {first.folder} and {other.folder}")
        codes.append(_print_diff(first, other))
    return max(codes)


def _print_diff(first: _Run, second: _Run) -> int:
    """A line for each difference; the exit code, 0 where the outcomes are the same."""
    lines = _settings(first.record, second.record)
    causes = [text for label, text in lines if label in _CAUSES]
    is_same, outcome = _outcome(first, second, causes)
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


def _outcome(first: _Run, second: _Run, causes: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether they are the same, and the lines that say it. A verdict is one on bytes: there is
    none where a run is not what it left."""
    lines = [
        f"{run.folder} is not finished: {run.record['status']}"
        for run in (first, second)
        if run.record["outputs"] is None
    ]
    for run in (first, second):
        lines += [f"{run.folder} is not what the run left: {fault}" for fault in run.check.faults]
        for remark in run.check.remarks:
            print(f"note: {run.folder}: {remark}", file=sys.stderr)
    comparison = compare_runs(first.record, first.folder, second.record, second.folder)
    if lines:
        return False, [*lines, *filter(None, [comparison.difference])]
    if comparison.difference and causes:
        more = f" (and {len(causes) - 1} more)" if causes[1:] else ""
        return False, [f"differs as it must: {causes[0]}{more}; first: {comparison.difference}"]
    return comparison.difference is None, [comparison.verdict]
