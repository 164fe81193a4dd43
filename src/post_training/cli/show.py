"""`post-training runs show | diff` and `artifact show | lineage | verify`: a record for a person,
whether the files are still what the run left, and how one run differs from others.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.records.artifact import FETCHED, origin_of, read_artifact
from post_training.records.check import GLANCE_BYTES, Check, check_artifact, check_run
from post_training.records.compare import RecordedRun, diff_runs
from post_training.records.run_record import read_whole_record


def show_run(run_dir: Path, state: str, *, as_json: bool, verify: bool = False) -> int:
    """Print the record; the exit code, 1 where `verify`, which reads all files, finds a fault.

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


def show_diffs(run_dirs: Sequence[Path], *, as_json: bool = False) -> int:
    """Print how each of the other runs differs from the first; the exit code, 0 where what all of
    them made is the same, else 4.

    Errors: UsageError for a folder that is no run, or whose record is damaged.
    """
    first, *others = map(RecordedRun.read, run_dirs)
    are_same, as_data = True, []
    for other in others:
        found = diff_runs(first, other)
        are_same = are_same and found.is_same
        if as_json:
            runs = {"run": str(first.folder), "other": str(other.folder)}
            as_data.append({**runs, **found.as_json()})
            continue
        if others[1:]:
            print(f"== {first.folder} and {other.folder}")
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        for label, text in found.lines:
            print(f"{label:12} {text}")
    if as_json:
        print(json.dumps(as_data, indent=2))
    return 0 if are_same else 4


def show_artifact(folder: Path, *, as_json: bool) -> None:
    """Print what an artifact is, and what made it. Errors: UsageError for what is none."""
    artifact = read_artifact(folder)
    if as_json:
        print(json.dumps(artifact, indent=2))
        return
    record = artifact["made_by"]
    image = record["image"]
    lines = {
        "artifact": f"{artifact['kind']}, {len(artifact['files'])} files",
        "fingerprint": artifact["fingerprint"],
        "lineage": artifact["lineage_hash"],
    }
    if record["stage"] == FETCHED:
        lines |= record["recipe"]
    else:
        lines["made by"] = f"{record['stage']}, run {record['run_id']}"
        lines["image"] = image["oci_digest"] if image else "unpinned: not reproducible by digest"
    found = check_artifact(folder, most_bytes=GLANCE_BYTES)
    warnings = [("warning", f"not what its run left: {fault}") for fault in found.faults]
    for label, value in [*lines.items(), *warnings, ("checked", found.told)]:
        print(f"{label:12} {value}")


def show_lineage(folder: Path, *, as_json: bool) -> None:
    """Print a tree: what made the artifact, and below it what made its inputs.

    Errors: PostTrainingError for an artifact that is not what the run left, as far as a glance at
    its smaller files tells; `verify_artifact` reads all. UsageError for a record that was changed.
    """
    found = check_artifact(folder, most_bytes=GLANCE_BYTES)
    if found.faults:
        told = "; ".join(found.faults)
        raise PostTrainingError(
            f"is not what its run left, so nobody knows where it comes from: {told}",
            where=str(folder),
        )
    if found.unread:
        print(f"note: checked: {found.told}; `artifact verify` reads all", file=sys.stderr)
    origin = origin_of(folder, read_artifact(folder)["fingerprint"])
    assert origin is not None
    if as_json:
        print(json.dumps(origin, indent=2))
        return
    print(f"{folder} ({_told(origin)})")
    for line in _tree(origin["inputs"], ""):
        print(line)


def verify_artifact(folder: Path) -> None:
    """Read all files again. Errors: PostTrainingError that names what differs."""
    found = check_artifact(folder)
    if found.faults:
        raise PostTrainingError("; ".join(found.faults), where=str(folder / ARTIFACT_RECORD))
    print(f"ok: {read_artifact(folder)['fingerprint']}")


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


def _tree(inputs: dict[str, Any], indent: str) -> Iterator[str]:
    for number, (key, value) in enumerate(inputs.items(), 1):
        is_last = number == len(inputs)
        made_by = value.get("made_by")
        what = _told(made_by) if made_by else f"fingerprint {value['fingerprint'][:12]}"
        yield f"{indent}{'└─' if is_last else '├─'} {key}: {value['path']} ({what})"
        if made_by:
            yield from _tree(made_by["inputs"], indent + ("   " if is_last else "│  "))


def _told(origin: dict[str, Any]) -> str:
    if origin["stage"] == FETCHED:
        return f"{origin['kind']}, {origin['run_id']}"
    image = f"image {origin['image'][:19]}" if origin["image"] else "unpinned"
    return f"{origin['kind']} of {origin['run_id']}, {image}, lineage {origin['lineage_hash'][:12]}"
