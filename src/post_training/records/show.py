"""`post-training runs show`: a run's record, for a person; and whether it still is what it left."""

import json
from pathlib import Path
from typing import Any

from post_training.records.check import GLANCE_BYTES, Check, check_run
from post_training.records.run_record import read_whole_record


def show_run(run_dir: Path, state: str, *, as_json: bool, verify: bool = False) -> int:
    """The exit code: 1 where `verify`, for which all files are read, finds a fault.

    state: of the run now, of which its record may know nothing: it was killed, or is queued.
    """
    record = read_whole_record(run_dir)
    found = check_run(run_dir, most_bytes=None if verify else GLANCE_BYTES)
    if as_json:
        print(json.dumps({**record, "state": state, "faults": found.faults}, indent=2))
    else:
        for label, value in _lines(record, run_dir, state, found):
            print(f"{label:12} {value}")
    return 1 if verify and found.faults else 0


def _lines(
    record: dict[str, Any], run_dir: Path, state: str, found: Check
) -> list[tuple[str, str]]:
    lines = [
        ("run", record["run_id"]),
        ("status", _status(record, state)),
        *(("warning", f"not what the run left: {fault}") for fault in found.faults),
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
    if record["outputs"] is not None:
        more = "; `runs show --verify` reads all" if found.unread else ""
        lines.append(("checked", f"{found.told}{more}"))
    return [*lines, *(("note", line) for line in found.notes)]


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
