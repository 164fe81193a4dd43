"""What a page tells of one run, read from its folder.

All of it is in the record and beside it: nothing is computed again, and no file is hashed.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from post_training.config.reference import ChosenSetting, beside_defaults
from post_training.core.errors import UsageError
from post_training.records.run_record import (
    METRICS_NAME,
    RECORD_NAME,
    Verdict,
    read_verdicts,
    read_whole_record,
    record_faults,
)
from post_training.report.annotations import (
    Annotations,
    read_annotations,
    read_pair_figures,
)
from post_training.report.curves import Curves, read_curves

PAGE = "report.html"
PREPARED = ("data/prepared.json", "dataset/prepared.json", "evaluation/prepared.json")
# Of a stage's rows, read for its report: a second's worth.
GLANCE_BYTES = 16 << 20
# The same for who asks for a report and can wait.
WHOLE_BYTES = 1 << 30
FindModel = Callable[[str], type[BaseModel] | None]


@dataclass(frozen=True)
class Attempt:
    """One attempt on the time line. begin, length: shares of the time between the first start and
    the last end; length is None of one whose end nobody recorded."""

    number: int
    status: str
    reason: str | None
    started: str
    ended: str | None
    host: str
    job: str | None
    begin: float
    length: float | None
    duration_s: float | None


@dataclass(frozen=True)
class Node:
    """A run, or an input that no run made, in the lineage. page: of a run's own report, where there
    is one. inputs: what it was made from."""

    key: str
    title: str
    kind: str
    path: str | None
    facts: dict[str, str]
    page: Path | None = None
    inputs: list["Node"] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """A dataset in what was trained on. tokens: its share of all, 0 to 1."""

    name: str
    read_as: str
    num_rows: int
    num_used: int
    num_tokens: int
    tokens: float


@dataclass(frozen=True)
class Mix:
    """The data as it was prepared. place: of prepared.json. rejected: {reason: rows}."""

    place: str
    shares: list[Share]
    counts: dict[str, Any]
    rejected: dict[str, int]


@dataclass(frozen=True)
class RunView:
    """state: of the run now. faults: how its record is not what the run left. settings: {role of
    the settings: with their defaults}. verdicts: of this run as a reproduction of another, and of
    those that repeated it."""

    run_dir: Path
    record: dict[str, Any]
    state: str
    faults: list[str]
    curves: Curves | None
    mixes: list[Mix]
    annotations: Annotations | None
    pairs: dict[str, Any] | None
    settings: dict[str, list[ChosenSetting]]
    attempts: list[Attempt]
    lineage: Node
    verdicts: list[Verdict]
    label: str = ""

    @property
    def changed_settings(self) -> list[ChosenSetting]:
        """Those of the recipe and the topology that are not their defaults."""
        return [
            setting
            for role in ("recipe", "topology")
            for setting in self.settings[role]
            if setting.is_changed
        ]

    @property
    def figures(self) -> dict[str, Any]:
        """The final figures; of a run that has none yet, those of its last line."""
        metrics = dict(self.record["metrics"])
        timing = metrics.pop("timing", None) or {}
        if not metrics and self.curves:
            axis = self.curves.axes["train"]
            metrics = {
                name.removeprefix("timing.").removesuffix("_bytes"): values[-1]
                for name, values in axis.figures.items()
                if values and values[-1] is not None
            }
            if axis.steps:
                metrics = {"step": axis.steps[-1], **metrics}
        # The num_steps of `timing` are those it measured, without the first ones: not the run's.
        return {**metrics, **{name: v for name, v in timing.items() if name not in metrics}}


def read_view(
    run_dir: Path, find_model: FindModel, *, state: str | None = None, most_bytes: int
) -> RunView:
    """find_model: the model of a stage's configuration, None where there is no such stage.
    state: where more is known of the run than its record says. most_bytes: of its rows.

    Errors: UsageError for a folder that is no run, or whose record is damaged.
    """
    try:
        return _read_view(run_dir, find_model, state=state, most_bytes=most_bytes)
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UsageError(
            "no record any more: parts of it are gone or damaged", where=str(run_dir / RECORD_NAME)
        ) from None


def _read_view(
    run_dir: Path, find_model: FindModel, *, state: str | None, most_bytes: int
) -> RunView:
    record = read_whole_record(run_dir)
    model = find_model(record["stage"])
    recorded = {role: record[role] for role in ("recipe", "topology", "placement")}
    if model is None:
        settings = {
            role: [ChosenSetting(key, json.dumps(value), None) for key, value in values.items()]
            for role, values in recorded.items()
        }
    else:
        settings = {role: beside_defaults(model, values) for role, values in recorded.items()}
    return RunView(
        run_dir,
        record,
        state or record["status"],
        record_faults(record),
        read_curves(run_dir),
        list(_mixes(run_dir)),
        read_annotations(run_dir, most_bytes),
        read_pair_figures(run_dir),
        settings,
        _attempts(run_dir, record),
        _lineage(run_dir, record),
        read_verdicts(run_dir, record["run_id"]),
        label=run_dir.name,
    )


def with_own_labels(views: list[RunView]) -> list[RunView]:
    """Each with a label that no other has: the end of its path, as long as it has to be."""
    labels = [view.run_dir.absolute().parts for view in views]
    depth = 1
    while depth < max(map(len, labels)) and len({part[-depth:] for part in labels}) < len(views):
        depth += 1
    return [
        replace(view, label="/".join(parts[-depth:]))
        for view, parts in zip(views, labels, strict=True)
    ]


def _mixes(run_dir: Path) -> Iterator[Mix]:
    for place in PREPARED:
        try:
            found = json.loads((run_dir / place).read_bytes())
            sources, counts = found["sources"], found["counts"]
            num_tokens = sum(source["num_tokens"] for source in sources)
            shares = [
                Share(
                    source["name"],
                    source.get("read_as", ""),
                    source["num_rows"],
                    source["num_used"],
                    source["num_tokens"],
                    source["num_tokens"] / num_tokens if num_tokens else 0.0,
                )
                for source in sources
            ]
        # Not of this stage, of an earlier version, or damaged, which `runs show` says.
        except (OSError, ValueError, LookupError, TypeError):
            continue
        yield Mix(place, shares, counts, found.get("rejected", {}))


def _attempts(run_dir: Path, record: dict[str, Any]) -> list[Attempt]:
    attempts = record["attempts"]
    starts = [_seconds(attempt["started"]) for attempt in attempts]
    ends = [attempt["ended"] and _seconds(attempt["ended"]) for attempt in attempts]
    if record["status"] == "running" and not ends[-1]:
        ends[-1] = _seconds_of_last_sign(run_dir)
    known = [moment for moment in [*starts, *ends] if moment]
    first, span = min(known), max(1.0, max(known) - min(known))
    return [
        Attempt(
            number,
            attempt["status"],
            attempt["reason"],
            attempt["started"],
            attempt["ended"],
            str((attempt.get("machine") or {}).get("host", "")),
            attempt["scheduler_job"],
            (start - first) / span,
            None if not end else max(0.0, end - start) / span,
            None if not end else max(0.0, end - start),
        )
        for number, (attempt, start, end) in enumerate(zip(attempts, starts, ends, strict=True), 1)
    ]


def _seconds(moment: str) -> float:
    """Since 1970. A time without a zone is in UTC."""
    found = datetime.fromisoformat(moment)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _seconds_of_last_sign(run_dir: Path) -> float:
    """When a run that is at work last wrote a figure, or its record."""
    path = run_dir / METRICS_NAME
    return (path if path.exists() else run_dir / RECORD_NAME).stat().st_mtime


def _lineage(run_dir: Path, record: dict[str, Any]) -> Node:
    outputs = record["outputs"] or {"artifacts": {}}
    facts = {
        f"{kind}, fingerprint": made["fingerprint"] for kind, made in outputs["artifacts"].items()
    }
    return Node(
        "",
        record["run_id"],
        record["stage"],
        str(run_dir),
        {**facts, **_image_fact(record["image"] and record["image"]["oci_digest"])},
        None,
        [_input_node(key, value) for key, value in record["inputs"].items()],
    )


def _input_node(key: str, value: dict[str, Any]) -> Node:
    path = value["path"]
    origin = value.get("made_by")
    if not isinstance(origin, dict):
        facts = {"fingerprint": value["fingerprint"]}
        return Node(key, Path(path).name, "no run is known to have made it", path, facts)
    facts = {
        "fingerprint": value["fingerprint"],
        "lineage": origin["lineage_hash"],
        "recipe": origin["recipe_hash"],
        **_image_fact(origin["image"]),
    }
    # RUN/model, RUN/dataset/rows.jsonl.
    pages = [parent / PAGE for parent in list(Path(path).parents)[:2]]
    return Node(
        key,
        origin["run_id"],
        f"{origin['kind']} of {origin['stage']}",
        path,
        facts,
        next((page for page in pages if page.is_file()), None),
        [_input_node(*item) for item in origin["inputs"].items()],
    )


def _image_fact(digest: str | None) -> dict[str, str]:
    return {"image": digest or "unpinned: not reproducible by digest"}


def differing_settings(views: list[RunView]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) of every setting of recipe and topology, and every input, in which
    the runs are not alike."""
    columns = []
    for view in views:
        settings = [*view.settings["recipe"], *view.settings["topology"]]
        inputs = {
            f"input {key}": value["fingerprint"][:12]
            for key, value in view.record["inputs"].items()
        }
        image = view.record["image"]
        columns.append(
            {
                "stage": view.record["stage"],
                "image": image["oci_digest"] if image else "unpinned",
                **{setting.key: setting.value for setting in settings},
                **inputs,
            }
        )
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [column.get(key, "(absent)") for column in columns]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
