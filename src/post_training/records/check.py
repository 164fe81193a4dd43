"""Whether a run is still what it left: its record, and the bytes of the files that it names.

    check_run(run_dir)        run.json, the files it lists, its artifacts
    check_artifact(folder)    an artifact, and the record of its run where it lies in that folder

Whatever shows, compares, states or repeats a run asks here, so that all of them see the same.
There is no signature in a record: this finds slips, half copies and damage, and nobody who takes
the pains to change the bytes, the digests and the seal alike.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import ARTIFACT_RECORD, file_names, fingerprint_files, hash_named
from post_training.records.artifact import artifact_record_faults, read_artifact
from post_training.records.run_record import (
    RECORD_NAME,
    is_of_first_version,
    read_record,
    read_whole_record,
    record_faults,
)

# What a command reads that only shows something; a verdict reads all.
GLANCE_BYTES = 256 << 20
# Of these a run's end says more than the artifact, which is sealed before it.
_SAID_AT_THE_END = {"status", "reason", "attempts", "outputs", "metrics", "seal"}
_HOW_FAR_UP = 3


@dataclass
class Check:
    """What was found.

    faults: how it is not what the run left, a line each.
    gone: recorded files that are not there any more.
    num_read: files whose bytes are as recorded, or a fault.
    unread: those that are too large for a glance, or not for this user to read.
    notes: what nothing is recorded of.
    """

    faults: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    num_read: int = 0
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        """What was looked at, such as "the record, 24 files by their bytes (2 not read)"."""
        text = f"the record, {self.num_read} files by their bytes"
        missing = [
            *([f"{len(self.unread)} not read"] if self.unread else []),
            *([f"{len(self.gone)} gone"] if self.gone else []),
        ]
        return f"{text} ({', '.join(missing)})" if missing else text

    @property
    def remarks(self) -> list[str]:
        """What a reader of a verdict should know, a line each; no fault."""
        if not self.gone:
            return self.notes
        more = f" and {len(self.gone) - 1} more" if self.gone[1:] else ""
        line = f"gone: {self.gone[0]}{more}; the record's sha256 stands for what was there"
        return [*self.notes, line]


def check_run(run_dir: Path, *, most_bytes: int | None = None) -> Check:
    """Compare run.json and the files it lists with what is there.

    most_bytes: read the smallest files up to so much; None: all of them.
    Errors: UsageError for what is no record.
    """
    record = read_whole_record(run_dir)
    found = Check([f"{RECORD_NAME}: {fault}" for fault in record_faults(record)])
    if is_of_first_version(record):
        found.notes.append("a record of the first version has no seal: no edit of it is noticed")
    outputs = record["outputs"]
    if outputs is None:
        return found
    if "run_files" not in outputs:
        found.notes.append("the record has no sha256 of metrics.jsonl and config.yaml")
    files = outputs["files"] | outputs.get("run_files", {})
    foreign: list[str] = []
    there: list[str] = []
    for kind, made in outputs["artifacts"].items():
        prefix = f"{made['path']}/"
        own = {
            name.removeprefix(prefix): digest
            for name, digest in outputs["files"].items()
            if name.startswith(prefix)
        }
        if fingerprint_files(own) != made["fingerprint"]:
            found.faults.append(f"{RECORD_NAME}: fingerprint of {kind} is not that of its files")
        folder = run_dir / made["path"]
        if (folder / ARTIFACT_RECORD).exists():
            found.faults += _artifact_of_run(folder, prefix, made, record)
            if any((folder / name).exists() for name in own):
                there.append(prefix)
            foreign += [f"{prefix}{name}" for name in file_names(folder) if name not in own]
    found.faults += [f"{name}: not part of the artifact" for name in foreign]
    _compare_bytes(run_dir, files, most_bytes, found)
    _make_faults_of_gone(found, tuple(there))
    return found


def check_artifact(folder: Path, *, most_bytes: int | None = None) -> Check:
    """Compare artifact.json and its files, and the record of its run where it lies in that folder.

    most_bytes: as of `check_run`. Errors: UsageError for what is no artifact.
    """
    artifact = read_artifact(folder)
    found = Check(artifact_record_faults(artifact))
    for parent in folder.absolute().parents[:_HOW_FAR_UP]:
        if (parent / RECORD_NAME).exists():
            record = read_record(parent)
            run_id = artifact["made_by"]["run_id"]
            if record.get("run_id", run_id) == run_id:  # One without any was damaged.
                place = parent / RECORD_NAME
                found.faults += [f"{place}: {fault}" for fault in record_faults(record)]
                found.faults += [f"{place}: {line}" for line in _other(record, artifact)]
            break
    files = artifact["files"]
    found.faults += [
        f"{name}: not part of the artifact" for name in file_names(folder) if name not in files
    ]
    _compare_bytes(folder, files, most_bytes, found)
    _make_faults_of_gone(found, ("",))
    return found


def _artifact_of_run(
    folder: Path, prefix: str, made: dict[str, Any], record: dict[str, Any]
) -> Iterator[str]:
    place = f"{prefix}{ARTIFACT_RECORD}"
    try:
        artifact = read_artifact(folder)
    except PostTrainingError as error:
        yield f"{place}: {error.problem}"
        return
    yield from (f"{place}: {fault}" for fault in artifact_record_faults(artifact))
    if artifact["fingerprint"] != made["fingerprint"]:
        yield f"{place}: its fingerprint is not the one in {RECORD_NAME}"
    yield from (f"{place}: {line}" for line in _other(record, artifact))


def _other(record: dict[str, Any], artifact: dict[str, Any]) -> Iterator[str]:
    """What the run's record and the artifact's copy of it say differently."""
    copy = artifact["made_by"]
    names = sorted((copy.keys() & record.keys()) - _SAID_AT_THE_END)
    if differing := [name for name in names if copy[name] != record[name]]:
        yield f"{', '.join(differing)}: not the same in made_by and in {RECORD_NAME}"


def _compare_bytes(
    folder: Path, files: dict[str, str], most_bytes: int | None, found: Check
) -> None:
    there: list[tuple[int, str]] = []
    for name in files:
        try:
            there.append(((folder / name).stat().st_size, name))
        except (FileNotFoundError, NotADirectoryError):
            found.gone.append(name)
    read, budget = [], most_bytes
    for size, name in sorted(there):
        if budget is not None:
            budget -= size
        # A verdict needs every file, and fails where one cannot be read.
        if budget is None or (budget >= 0 and os.access(folder / name, os.R_OK)):
            read.append(name)
        else:
            found.unread.append(name)
    found.num_read += len(read)
    found.gone.sort()
    digests = hash_named(folder, read)
    found.faults += [
        f"{name}: changed (sha256 is {digests[name]}, was {files[name]})"
        for name in sorted(read)
        if digests[name] != files[name]
    ]


def _make_faults_of_gone(found: Check, prefixes: tuple[str, ...]) -> None:
    """Of a run a file may be cleared away; an artifact is whole, or all of it is gone, as from
    an export."""
    found.faults += [f"{name}: gone" for name in found.gone if name.startswith(prefixes)]
    found.gone = [name for name in found.gone if not name.startswith(prefixes)]
