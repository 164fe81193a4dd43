"""Where two runs part: what they are (`runs diff`), and what they made (`reproduce` asks it too).

What they made, in this order, so that what is found first is nearest to the cause:

    steps.jsonl -> metrics.jsonl -> data -> checkpoints -> everything else -> final metrics

The first step that differs is told with the first row of the data that does and the first weights.
What holds times or paths is left out: `timing`, and the files that a record lists as unstable. The
records' hashes stand for the files: who asks for a verdict has compared them with the bytes
(check.py).

What they are, a line for each difference:

    stage, recipe, topology, input, image, code    any of these may change the bits; of input
                                                   folders that are still there, the files
    packages, environment, machine                 what these rest on
    placement                                      never changes them
    outcome                                        the first difference in what they made: there is
                                                   one where the recipe or an input is another
"""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from post_training.config.model import changed_settings
from post_training.core.errors import UsageError, shown
from post_training.core.hashing import fingerprint_files, hash_files, sha256_of_any
from post_training.records.check import Check, check_run
from post_training.records.first_difference import (
    first_row_difference,
    first_tensor_difference,
    natural_order,
)
from post_training.records.machine import portable_environment
from post_training.records.run_record import (
    METRICS_NAME,
    STEPS_NAME,
    fingerprints,
    image_identity,
    read_whole_record,
)

_MADE_FIRST = ("data", "evaluation", "reference", "evaluation_reference")
# Where one of these is another, so should be what comes out.
_CAUSES = ("stage", "recipe", "input")


@dataclass(frozen=True)
class Comparison:
    """What came of comparing what two runs made.

    difference: the first; None when everything compared is equal.
    num_files, num_metric_lines: how much was compared.
    deviation: relative, the largest of the figures in metrics.jsonl; None where lines, or figures
    that are counts, are not the same.
    """

    difference: str | None
    num_files: int
    num_metric_lines: int
    deviation: float | None = None

    @property
    def verdict(self) -> str:
        if self.difference:
            return f"differs: {self.difference}"
        metrics = f" and {self.num_metric_lines} lines of metrics" if self.num_metric_lines else ""
        return f"identical: {self.num_files} files{metrics}"


def compare_runs(
    first: dict[str, Any], first_dir: Path, second: dict[str, Any], second_dir: Path
) -> Comparison:
    """Compare what two runs made, by their records and their lines of figures.

    Where there is nothing to compare, that is a difference too. An unfinished run has no files.
    Errors: UsageError for a damaged line of figures.
    """
    lines = _read_lines(first_dir), _read_lines(second_dir)
    files = _files(first), _files(second)
    if first["outputs"] is None or second["outputs"] is None:
        files = {}, {}  # Of what is not finished nothing is recorded yet, so nothing is absent.
    found = next(_differences(first, second, files, (first_dir, second_dir), lines), None)
    return Comparison(found, len(files[0]), len(lines[0]), _deviation(*lines))


def _deviation(one: Any, other: Any) -> float | None:
    """The largest relative deviation of floats; None where anything else differs."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = [_deviation(*pair) for pair in zip(one, other, strict=True)]
        return None if None in parts else max(parts, default=0.0)
    if one == other:
        return 0.0
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(abs(one), abs(other))
    return None


def _differences(
    first: dict[str, Any],
    second: dict[str, Any],
    files: tuple[dict[str, str], dict[str, str]],
    folders: tuple[Path, Path],
    lines: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> Iterator[str]:
    ours, theirs = files
    differing = sorted(
        (name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)),
        key=lambda name: (not name.startswith(_MADE_FIRST), natural_order(name)),
    )
    made_first = [name for name in differing if name.startswith(_MADE_FIRST)]
    data = _data_difference(made_first, folders, ours, theirs)
    is_same_data = all(name.endswith(".json") for name in made_first)
    weights = _weights_difference(differing, folders)
    for text in (*_step_difference(folders, is_same_data), *_metric_difference(*lines)):
        yield "; ".join(filter(None, (text, data, weights)))
    if data:
        yield data
    if weights:
        yield weights
    yield from (_file_difference(name, ours, theirs) for name in differing)
    yield from _final_difference(first["metrics"], second["metrics"])
    if not ours:
        yield "there are no recorded output files to compare"


def _files(record: dict[str, Any]) -> dict[str, str]:
    return {} if record["outputs"] is None else record["outputs"]["files"]


def _read_lines(run_dir: Path, name: str = METRICS_NAME) -> list[dict[str, Any]]:
    """Without `timing`. Errors: UsageError that names the line which is no record of figures."""
    path, found = run_dir / name, []
    if not path.exists():
        return []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UsageError("not a line of figures: it is damaged", where=f"{path}:{number}")
        found.append({key: value for key, value in line.items() if key != "timing"})
    return found


def _step_difference(folders: tuple[Path, Path], is_same_data: bool) -> Iterator[str]:
    ours, theirs = (_read_lines(folder, STEPS_NAME) for folder in folders)
    if not ours or not theirs:
        return
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if one == other:
            continue
        names = [name for name in ("loss", "grad_norm") if one.get(name) != other.get(name)]
        told = [f"{name} is {one.get(name)}, then {other.get(name)}" for name in names]
        if one.get("rows") != other.get("rows"):
            rows = "other rows"
        else:  # Their numbers, that is.
            rows = "the same rows" if is_same_data else "the same row numbers of other data"
        yield f"step {one.get('step', number)}: {', '.join([rows, *told])}"
        return
    if len(ours) != len(theirs):
        yield f"{len(ours)} steps, then {len(theirs)}"


def _data_difference(
    names: list[str],
    folders: tuple[Path, Path],
    ours: dict[str, str],
    theirs: dict[str, str],
) -> str | None:
    """In the data as it was prepared: the first row, else the first field, else the first file."""
    if not names:
        return None
    for place in dict.fromkeys(name.rpartition("/")[0] for name in names):
        try:
            row = first_row_difference(*(folder / place for folder in folders))
        except (OSError, ValueError, LookupError, struct.error):
            row = None  # No longer whole, and a fault of its own.
        if row:
            return f"{place}: {row}"
    if names[0].endswith(".json") and (field := _field_difference(names[0], folders)):
        return f"{names[0]}: {field}"
    return _file_difference(names[0], ours, theirs)


def _field_difference(name: str, folders: tuple[Path, Path]) -> str | None:
    try:
        one, other = (json.loads((folder / name).read_bytes()) for folder in folders)
    except (OSError, ValueError):
        return None
    for key, mine, others in _walk(one, other, ""):
        return f"{key} is {shown(mine)}, then {shown(others)}"
    return None


def _walk(one: Any, other: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            inside = f"{place}.{key}" if place else key
            yield from _walk(one.get(key), other.get(key), inside)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _walk(*pair, f"{place}[{index}]")
    elif one != other:
        yield place, one, other


def _metric_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    for number, (one, other) in enumerate(zip_longest(ours, theirs), 1):
        if one is None or other is None:
            yield f"{METRICS_NAME} has {len(ours)} lines, then {len(theirs)}"
            return
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                place = f"step {one['step']}" if "step" in one else f"line {number}"
                yield f"{METRICS_NAME}: {place}: {key} is {one.get(key)}, then {other.get(key)}"
                return


def _weights_difference(names: list[str], folders: tuple[Path, Path]) -> str | None:
    """In the earliest weights that both runs still have."""
    for name in names:
        first, second = (folder / name for folder in folders)
        if name.endswith(".safetensors") and first.exists() and second.exists():
            try:
                tensor = first_tensor_difference(first, second)
            except (ValueError, LookupError, struct.error):
                return None  # No tensors any more: its sha256 says so.
            return f"{name}: {tensor}" if tensor else None
    return None


def _file_difference(name: str, ours: dict[str, str], theirs: dict[str, str]) -> str:
    return f"{name}: sha256 is {ours.get(name, 'absent')}, then {theirs.get(name, 'absent')}"


def _final_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for key in sorted((ours.keys() | theirs.keys()) - {"timing"}):
        if ours.get(key) != theirs.get(key):
            yield f"metric {key} is {ours.get(key)}, then {theirs.get(key)}"
            return


@dataclass(frozen=True)
class RecordedRun:
    """A run that is put beside others. Errors of `read`: UsageError for a folder that is no run, or
    whose record is damaged."""

    folder: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "RecordedRun":
        return cls(folder, read_whole_record(folder))

    @cached_property
    def check(self) -> Check:
        """All of its bytes are read: once, however many runs it stands beside."""
        return check_run(self.folder)


@dataclass(frozen=True)
class RunDiff:
    """is_same: what they made. lines: (label, text) of each difference, and the outcome. notes: on
    what could not be compared."""

    is_same: bool
    lines: list[tuple[str, str]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        differences = [{"of": label, "text": text} for label, text in self.lines]
        return {"is_same": self.is_same, "differences": differences, "notes": self.notes}


def diff_runs(first: RecordedRun, second: RecordedRun) -> RunDiff:
    """Every setting that differs, and where what the runs made parts. All their files are read."""
    lines = _changed_settings(first.record, second.record)
    causes = [text for label, text in lines if label in _CAUSES]
    is_same, outcome = _outcome(first, second, causes)
    notes = [f"{run.folder}: {remark}" for run in (first, second) for remark in run.check.remarks]
    return RunDiff(is_same, [*lines, *(("outcome", text) for text in outcome)], notes)


def _changed_settings(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str]]:
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
    first: RecordedRun, second: RecordedRun, causes: Sequence[str]
) -> tuple[bool, list[str]]:
    """Whether what they made is the same, and the lines that say it.

    A verdict is one on bytes: there is none where a run is not what it left.
    """
    lines = [
        f"{run.folder} is not finished: {run.record['status']}"
        for run in (first, second)
        if run.record["outputs"] is None
    ]
    for run in (first, second):
        lines += [f"{run.folder} is not what the run left: {fault}" for fault in run.check.faults]
    comparison = compare_runs(first.record, first.folder, second.record, second.folder)
    if lines:
        return False, [*lines, *filter(None, [comparison.difference])]
    if comparison.difference and causes:
        more = f" (and {len(causes) - 1} more)" if causes[1:] else ""
        return False, [f"differs as it must: {causes[0]}{more}; first: {comparison.difference}"]
    return comparison.difference is None, [comparison.verdict]
