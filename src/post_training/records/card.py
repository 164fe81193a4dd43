"""A model's card, README.md, from what its run recorded: nothing in it is written by hand.

    artifact.json                  fingerprint, settings, image, commit, inputs and what made them
    run.json, metrics.jsonl        of the run, where it is still around the model: figures
    data/prepared.json             sources and tokens, there or in the prepared dataset
    reproduction.json              verdicts, of folders beside the run

Licences and the base's name on the hub are recorded for what was fetched from there
(records/licences.py); else they are asked for. What is not known is said to be so. A card names no
folder, host or person of the place it is from (export.Redaction).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.core import yaml
from post_training.core.errors import UsageError
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.records.artifact import read_artifact_of_run
from post_training.records.export import Redaction
from post_training.records.licences import hub_name_of
from post_training.records.run_record import METRICS_NAME, RECORD_NAME, read_record, read_verdicts

CARD_NAME = "README.md"
_NOT_RECORDED = "not recorded"
_NOT_STATED = "not stated"
_HOW_FAR_UP = 3
_PREPARED = "data/prepared.json"


@dataclass(frozen=True)
class CardDetails:
    """What no record has, or what is to stand instead of it.

    name: a title. base: the base model on the hub. licence: of the model, by the hub's names.
    licences: {name of a source: its licence}.
    """

    name: str
    base: str | None = None
    licence: str | None = None
    licences: dict[str, str] = field(default_factory=dict)


def write_card(folder: Path, details: CardDetails) -> str:
    """The card of the model in this folder, as Markdown with the hub's YAML above it.

    Errors: UsageError for what is no model that a run made, and for the licence of a source that
    the data do not have.
    """
    artifact = read_artifact_of_run(folder)
    if not artifact["kind"].endswith(("model", "adapter")):
        raise UsageError(f"is a {artifact['kind']}, not a model", where=str(folder))
    record = artifact["made_by"]
    run_dir = _run_around(folder, record["run_id"])
    sources = _sources(record, run_dir)
    names = [source["name"] for source in sources]
    if unknown := [name for name in details.licences if name not in names]:
        raise UsageError(
            f"the licence of {unknown[0]}: the data have no such source",
            where=str(folder),
            hint=f"sources: {', '.join(names) or 'none is recorded'}",
        )
    parts = [
        f"# {details.name}",
        f"Made by `{record['stage']}` of post-training, run `{record['run_id']}`. This card was "
        "written from the run's record.",
        "## Base",
        "\n".join(_base(record, details)),
        "## Data",
        "\n".join(_data(record, sources, details)),
        "## Settings",
        "\n".join(_settings(record)),
        "## Figures",
        "\n".join(_figures(run_dir)),
        "## Where it comes from",
        "\n".join(_lineage(artifact)),
        "## Reproduce and verify",
        "\n".join(_reproduce(artifact, run_dir)),
    ]
    text = Redaction(record, run_dir or folder).text("\n\n".join(parts))
    return f"---\n{yaml.dump(_for_the_hub(record, details))}---\n\n{text}\n"


def _run_around(folder: Path, run_id: str) -> Path | None:
    """The folder of the run that made it, where the model still lies in it."""
    for parent in folder.absolute().parents[:_HOW_FAR_UP]:
        if (parent / RECORD_NAME).exists():
            return parent if read_record(parent).get("run_id") == run_id else None
    return None


def _sources(record: dict[str, Any], run_dir: Path | None) -> list[dict[str, Any]]:
    """Of the prepared data, in the run or where it had them from; none where they are gone."""
    places = [] if run_dir is None else [run_dir / _PREPARED]
    if (prepared := record["inputs"].get("data.prepared")) is not None:
        places.append(Path(prepared["path"]) / "prepared.json")
    for place in places:
        if place.exists():
            return json.loads(place.read_text()).get("sources", [])
    return []


def _for_the_hub(record: dict[str, Any], details: CardDetails) -> dict[str, Any]:
    """Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata"""
    base = record["inputs"].get("model.path", {})
    name = details.base or hub_name_of(base.get("made_by"))
    known = {"license": details.licence, "base_model": name}
    return {
        **{name: value for name, value in known.items() if value is not None},
        "library_name": "transformers",
        "tags": ["post-training", record["stage"]],
    }


def _base(record: dict[str, Any], details: CardDetails) -> Iterator[str]:
    base = record["inputs"].get("model.path")
    if record["stage"] == "init-model":
        yield "None: its weights were drawn at random."
        return
    if base is None:  # of several models, of a checkpoint, or of what a command read
        if details.base:
            yield f"- model: {details.base}"
        yield from _inputs(record["inputs"], "") if record["inputs"] else [_NOT_RECORDED]
        return
    made_by = base.get("made_by")
    hub = hub_name_of(made_by)
    yield f"- model: {details.base or hub or base['path']}"
    yield f"- fingerprint: `{base['fingerprint']}`"
    if hub:
        yield f"- revision: `{made_by['run_id'].split()[-1]}`"
        licence = record.get("licences", {}).get("model.path", _NOT_STATED)
        yield f"- licence, as its card states it: {licence}"
    elif made_by:
        yield f"- made by `{made_by['stage']}`, run `{made_by['run_id']}`"


def _data(
    record: dict[str, Any], sources: list[dict[str, Any]], details: CardDetails
) -> Iterator[str]:
    if sources:
        yield "| source | rows | tokens | licence |"
        yield "|---|---:|---:|---|"
        recorded = _licences_of_data(record)
        for number, source in enumerate(sources):
            counts = (source.get("num_used", source.get("num_rows")), source.get("num_tokens"))
            told = [_NOT_RECORDED if count is None else f"{count:,}" for count in counts]
            known = recorded.get(f"data.datasets[{number}]", _NOT_STATED)
            licence = details.licences.get(source["name"], known)
            yield f"| {_cell(source['name'])} | {' | '.join(told)} | {_cell(licence)} |"
        yield ""
        yield "Tokens are those of one pass over the rows that are used."
    else:
        yield "Which rows were used of them is not recorded beside the model."
    yield ""
    for key, value in record["inputs"].items():
        if key.startswith("data."):
            yield f"- `{key}`: {Path(value['path']).name}, fingerprint `{value['fingerprint']}`"


def _licences_of_data(record: dict[str, Any]) -> dict[str, str]:
    """Of the run's datasets, or of those of the run that prepared its data."""
    prepared = record["inputs"].get("data.prepared", {}).get("made_by", {})
    return {**prepared.get("licences", {}), **record.get("licences", {})}


def _settings(record: dict[str, Any]) -> Iterator[str]:
    """Recipe and topology, without what is not set."""
    yield "| setting | value |"
    yield "|---|---|"
    for key, value in {**record["recipe"], **record.get("topology", {})}.items():
        if value not in (None, {}, []):
            yield f"| `{key}` | {_cell(value if isinstance(value, str) else json.dumps(value))} |"


def _figures(run_dir: Path | None) -> Iterator[str]:
    if run_dir is None:
        yield "They are in the record of the run, which is not beside the model."
        return
    record, evaluation = read_record(run_dir), _last_evaluation(run_dir)
    if record["status"] != "finished":
        yield f"The run is {record['status']}: these are figures on the way."
        yield ""
    yield "| figure | value |"
    yield "|---|---:|"
    figures = {key: value for key, value in record["metrics"].items() if key != "timing"}
    for name, value in {**figures, **evaluation}.items():
        yield f"| `{name}` | {value:.6g} |"


def _last_evaluation(run_dir: Path) -> dict[str, float]:
    path = run_dir / METRICS_NAME
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [line["eval"] for line in lines if "eval" in line]
    return {f"eval/{name}": value for name, value in found[-1].items()} if found else {}


def _lineage(artifact: dict[str, Any]) -> Iterator[str]:
    yield f"- this {artifact['kind']}: lineage `{artifact['lineage_hash']}`"
    yield from _inputs(artifact["made_by"]["inputs"], "  ")


def _inputs(inputs: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in inputs.items():
        made_by = value.get("made_by")
        what = f"`{key}`: {Path(value['path']).name}, fingerprint `{value['fingerprint'][:12]}…`"
        if made_by is None:
            yield f"{indent}- {what}"
        else:
            licences = [f", {key}: {name}" for key, name in made_by.get("licences", {}).items()]
            told = f"; licences{''.join(licences)[1:]}" if licences else ""
            yield f"{indent}- {what}, of `{made_by['stage']}`, run `{made_by['run_id']}`{told}"
            yield from _inputs(made_by["inputs"], indent + "  ")


def _reproduce(artifact: dict[str, Any], run_dir: Path | None) -> Iterator[str]:
    record = artifact["made_by"]
    image = record["image"]
    if image is None:
        yield "- image: none was pinned, so it can't be reproduced by digest"
    else:
        yield f"- image: {image['name']} {image['version']}, `{image['oci_digest']}`"
    yield f"- commit: `{record['code'].get('commit') or 'unknown'}`"
    yield f"- fingerprint: `{artifact['fingerprint']}`, over all files but {ARTIFACT_RECORD},"
    yield "  README.md and .gitattributes"
    verdicts = [] if run_dir is None else read_verdicts(run_dir, record["run_id"])
    for verdict in verdicts:
        yield f"- verdict: {verdict}"
    if not verdicts:
        yield "- verdict: no reproduction is recorded beside the run"
    yield ""
    yield "With the run's folder, or what `post-training runs export` made of it:"
    yield ""
    yield "```sh"
    yield "post-training reproduce RUN             # the same image, inputs and settings again"
    yield "post-training artifact verify MODEL     # are these the files that the run left?"
    yield "post-training artifact lineage MODEL    # all it came from"
    yield "```"


def _cell(text: str) -> str:
    """In a table: in one line, without a bar."""
    return " ".join(text.split()).replace("|", "\\|")
