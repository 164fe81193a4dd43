"""Compare two finished runs that should be equal: the first thing that differs, or nothing.

    steps.jsonl -> metrics.jsonl -> data -> checkpoints -> everything else -> final metrics

The first step that differs is told with the first row of the data that does and the first weights,
so that what comes first is nearest to the cause. What holds times or paths is left out: `timing`,
and the files that a record lists as unstable. The records' hashes stand for the files: who asks for
a verdict has compared them with the bytes (check.py).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.messages import shown
from post_training.records.prepared_rows import first_row_difference
from post_training.records.run_record import METRICS_NAME, STEPS_NAME
from post_training.records.tensors import first_tensor_difference, natural_order

_MADE_FIRST = ("data", "evaluation", "reference", "evaluation_reference")


@dataclass(frozen=True)
class Comparison:
    """difference: None when everything compared is equal. num_*: how much was compared.
    deviation: relative, of the figures in metrics.jsonl; None where lines, or figures that
    are counts, are not the same."""

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
    """Compare records and metrics; the records' hashes stand for the files.

    Returns a difference, too, when there is nothing to compare. An unfinished run has no files.
    """
    lines = _read_lines(first_dir), _read_lines(second_dir)
    files = _files(first), _files(second)
    if first["outputs"] is None or second["outputs"] is None:
        files = {}, {}  # Of what is not finished nothing is recorded yet, so nothing is absent.
    found = next(_differences(first, second, files, (first_dir, second_dir), lines), None)
    return Comparison(found, len(files[0]), len(lines[0]), _deviation(*lines))


def _files(record: dict[str, Any]) -> dict[str, str]:
    return {} if record["outputs"] is None else record["outputs"]["files"]


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
