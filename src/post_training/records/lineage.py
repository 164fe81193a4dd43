"""`post-training artifact show | lineage | verify`: what an artifact is, and came from."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.records.artifact import origin_of, read_artifact
from post_training.records.check import GLANCE_BYTES, check_artifact


def show_artifact(folder: Path, *, as_json: bool) -> None:
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
        "made by": f"{record['stage']}, run {record['run_id']}",
        "image": image["oci_digest"] if image else "unpinned: not reproducible by digest",
    }
    found = check_artifact(folder, most_bytes=GLANCE_BYTES)
    warnings = [("warning", f"not what its run left: {fault}") for fault in found.faults]
    for label, value in [*lines.items(), *warnings, ("checked", found.told)]:
        print(f"{label:12} {value}")


def show_lineage(folder: Path, *, as_json: bool) -> None:
    """A tree: what made the artifact, and below it what made its inputs.

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


def _tree(inputs: dict[str, Any], indent: str) -> Iterator[str]:
    for number, (key, value) in enumerate(inputs.items(), 1):
        is_last = number == len(inputs)
        made_by = value.get("made_by")
        what = _told(made_by) if made_by else f"fingerprint {value['fingerprint'][:12]}"
        yield f"{indent}{'└─' if is_last else '├─'} {key}: {value['path']} ({what})"
        if made_by:
            yield from _tree(made_by["inputs"], indent + ("   " if is_last else "│  "))


def _told(origin: dict[str, Any]) -> str:
    image = f"image {origin['image'][:19]}" if origin["image"] else "unpinned"
    return f"{origin['kind']} of {origin['run_id']}, {image}, lineage {origin['lineage_hash'][:12]}"
