"""`post-training runs show`: a run's record, for a person."""

import json
from pathlib import Path
from typing import Any

from post_training.records.run_record import is_edited, read_record

EDITED = "this record was changed by hand after the run wrote it"


def show_run(run_dir: Path, state: str, *, as_json: bool) -> None:
    """state: of the run now, of which its record may know nothing: it was killed, or is queued."""
    record = read_record(run_dir)
    if as_json:
        print(json.dumps({**record, "state": state}, indent=2))
        return
    for label, value in _lines(record, run_dir, state):
        print(f"{label:12} {value}")


def _lines(record: dict[str, Any], run_dir: Path, state: str) -> list[tuple[str, str]]:
    lines = [
        ("run", record["run_id"]),
        ("status", _status(record, state)),
        *([("warning", EDITED)] if is_edited(record) else []),
        ("command", " ".join(record["command"])),
        ("image", _image(record["image"])),
        ("code", _code(record)),
        ("topology", ", ".join(f"{key}={value}" for key, value in record["topology"].items())),
        ("machine", f"{record['machine']['host']}, {record['machine']['processor']}"),
    ]
    lines += [
        ("input", f"{key}: {value['path']} ({value['fingerprint'][:12]})")
        for key, value in record["inputs"].items()
    ]
    for number, attempt in enumerate(record["attempts"], 1):
        job = f", Slurm job {attempt['scheduler_job']}" if attempt["scheduler_job"] else ""
        reason = f" ({attempt['reason']})" if attempt["reason"] else ""
        times = f"{attempt['started']} to {attempt['ended'] or '?'}"
        lines.append((f"attempt {number}", f"{attempt['status']}{reason}, {times}{job}"))
    outputs = record["outputs"] or {"artifacts": {}}
    lines += [
        ("output", f"{kind}: {run_dir / made['path']} ({made['fingerprint'][:12]})")
        for kind, made in outputs["artifacts"].items()
    ]
    metrics = {key: value for key, value in record["metrics"].items() if key != "timing"}
    for label, figures in (("metrics", metrics), ("timing", record["metrics"].get("timing"))):
        if figures:
            told = ", ".join(f"{key}={value:.6g}" for key, value in figures.items())
            lines.append((label, told))
    return lines


def _status(record: dict[str, Any], state: str) -> str:
    said = f"{record['status']}: {record['reason']}" if record["reason"] else record["status"]
    if record["status"] == "running" and state != "running":
        said = "killed (its record was never closed)"
    if state == "killed":
        return f"{said}; the same command continues it"
    return said if state == record["status"] else f"{state}; before that {said}"


def _image(image: dict[str, Any] | None) -> str:
    if image is None:
        return "unpinned: not reproducible by digest"
    return (
        f"{image['name']} {image['version']}, {image['oci_digest']}, "
        f"verified by {image['verified_by']}"
    )


def _code(record: dict[str, Any]) -> str:
    code = record["code"]
    if "commit" not in code:
        return f"from the {code['from']}"
    changed = " with changes" if code.get("dirty") or code.get("diff") else ""
    return f"from the {code['from']}, commit {(code['commit'] or 'unknown')[:12]}{changed}"
