"""`post-training runs export`: a run's record as one archive, the same bytes each time, for the
tools of others.

RUN_ID.zip    ro-crate-metadata.json    for people and catalogues (records/provenance.py)
              provenance.intoto.json    for supply chains (the same); only of a finished run whose
                                        record and files are what it left, by their bytes
              run.json config.yaml metrics.jsonl steps.jsonl, each artifact.json, the report

Weights, datasets, samples, chunks and logs stay where they are; both descriptions name what was
made by its sha256. `with_data` packs the recorded files of up to 1 MiB too, as they are.

What is packed names no folder, host or person of the place it is from:

    below the working folder or the run's   relative to it
    what every image has (/opt, /etc, …)    as it is
    any other absolute path                 [path]/NAME
    hosts, and the owner's name             [host], [user]
    secrets of a known form                 [redacted: KIND]

Recipe and topology stay as they are: the identity is made of them. Its run.json says under
`redaction` what was replaced, with the sha256 of the original, and holds together by itself:
`post-training runs show` of the unpacked folder finds no fault.
"""

import json
import os
import pwd
import re
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.core import yaml
from post_training.core.errors import UsageError, tell
from post_training.core.files import atomic_file
from post_training.core.hashing import ARTIFACT_RECORD, sha256_bytes
from post_training.core.secrets import redact
from post_training.records.artifact import read_artifact
from post_training.records.check import check_run
from post_training.records.provenance import CRATE_NAME, STATEMENT_NAME, make_crate, make_statement
from post_training.records.run import is_live
from post_training.records.run_record import (
    CONFIG_NAME,
    METRICS_NAME,
    RECORD_NAME,
    STEPS_NAME,
    is_of_first_version,
    read_whole_record,
    record_faults,
    seal,
)

# Not after a letter, a dot or a slash: no part of a relative path, of an address, of `1/2`.
_ABSOLUTE = re.compile(r"(?<![\w./~\]-])/(?![/\s])[^\s:,;'\"=\[\](){}<>|]+")
_OF_EVERY_IMAGE = ("/opt/", "/etc/", "/run/", "/usr/", "/dev/", "/proc/", "/sys/")
_HOME = re.compile(r"/(?:home|users|Users)/([\w.-]+)|/root(?=/|$)")
# Of a record, what stays as it is.
_KEPT = ("recipe", "topology", "identity", "packages", "seal")
_NODES = "SLURM_JOB_NODELIST"
# A shorter name is likely a word, or part of one.
_SHORTEST_NAME = 4
LARGEST_BYTES = 1 << 20
_FIGURES = (METRICS_NAME, STEPS_NAME, "report/report.json")
_DATE = (1980, 1, 1, 0, 0, 0)  # The first that a ZIP can say.


def export_run(run_dir: Path, target: Path | None, *, with_data: bool = False) -> Path:
    """Write the archive; its path, RUN_ID.zip in the working folder unless `target` names another.

    Errors: UsageError for a live run, when the archive is there already, and for a file that is a
    link out of the run's folder.
    """
    record = read_whole_record(run_dir)
    if is_live(run_dir):
        raise UsageError("the run is live", where=str(run_dir), hint="export it when it has ended")
    target = target or Path(f"{record['run_id']}.zip")
    if target.exists():
        raise UsageError("there already", where=str(target), hint="choose another --output")
    found = check_run(run_dir)
    why_not = [f"not what the run left: {fault}" for fault in found.faults]
    if is_of_first_version(record):
        why_not.append("a record of the first version has no seal")
    for line in why_not:
        tell(f"warning: {run_dir}: {line}, so there is no {STATEMENT_NAME}")
    files, shown = _packed(run_dir, record, with_data=with_data)
    made = {CRATE_NAME: make_crate(shown, sorted(files))}
    if record["outputs"] is not None and not why_not:
        made[STATEMENT_NAME] = make_statement(
            shown, gone=found.gone, packed={name: sha256_bytes(files[name]) for name in files}
        )
    with (
        atomic_file(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, value in made.items():
            _add(archive, name, _json(value))
        for name in sorted(files):
            _add(archive, name, files[name])
    return target


def _packed(
    run_dir: Path, record: dict[str, Any], *, with_data: bool
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files by their names, and the record as it is shown in them."""
    redaction = Redaction(record, run_dir)
    original = {RECORD_NAME: _read(run_dir, RECORD_NAME)}
    shown = redaction.value({key: value for key, value in record.items() if key != "seal"})
    files: dict[str, bytes] = {}
    outputs = shown["outputs"] or {"artifacts": {}, "files": {}}
    if (run_dir / CONFIG_NAME).exists():
        original[CONFIG_NAME] = _read(run_dir, CONFIG_NAME)
        settings = yaml.load(original[CONFIG_NAME], CONFIG_NAME).data
        files[CONFIG_NAME] = yaml.dump(redaction.value(settings, CONFIG_NAME)).encode()
    for name in _FIGURES:
        if (run_dir / name).exists():
            content = _read(run_dir, name)
            text = redaction.text(content.decode(errors="replace")).encode()
            if text != content and name in outputs["files"]:
                tell(f"warning: left out: {name}: it names folders or people")
                continue
            original[name], files[name] = content, text
    for made in outputs["artifacts"].values():
        name = f"{made['path']}/{ARTIFACT_RECORD}"
        if (run_dir / name).exists():
            original[name] = _read(run_dir, name)
            files[name] = _show_artifact(read_artifact(run_dir / made["path"]), redaction)
    changed = {name: sha256_bytes(content) for name, content in original.items()}
    for name in outputs.get("run_files", {}).keys() & files.keys():
        # As it is here; `redaction.files` has what it was.
        if outputs["run_files"][name] == changed[name]:
            outputs["run_files"][name] = sha256_bytes(files[name])
    shown["redaction"] = {
        "places": list(dict.fromkeys(redaction.places)),
        "files": {name: digest for name, digest in changed.items() if name not in _FIGURES},
    }
    _seal_as_it_was(shown, record)
    files[RECORD_NAME] = _json(shown)
    if with_data:
        files |= _small_files(run_dir, [name for name in outputs["files"] if name not in files])
    return files, shown


def show_artifact_record(folder: Path) -> bytes:
    """artifact.json of an artifact that leaves this place without its run: what it says of the run
    that made it names no folder, host or person."""
    artifact = read_artifact(folder)
    return _show_artifact(artifact, Redaction(artifact["made_by"], folder))


def _show_artifact(artifact: dict[str, Any], redaction: "Redaction") -> bytes:
    maker = artifact["made_by"]
    told = redaction.value({key: value for key, value in maker.items() if key != "seal"})
    _seal_as_it_was(told, maker)
    return _json({**artifact, "made_by": told})


def _seal_as_it_was(shown: dict[str, Any], record: dict[str, Any]) -> None:
    """A record that was edited must not be sealed for it."""
    if record_faults(record):
        shown["seal"] = record.get("seal")
    elif "seal" in record:
        shown["seal"] = seal(shown)


def _read(run_dir: Path, name: str) -> bytes:
    """Errors: UsageError for a link to what is not the run's."""
    path = run_dir / name
    if not path.resolve().is_relative_to(run_dir.resolve()):
        raise UsageError("a link out of the run's folder, and not exported", where=str(path))
    return path.read_bytes()


def _small_files(run_dir: Path, names: list[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        path = run_dir / name
        if path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            found[name] = _read(run_dir, name)
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


class Redaction:
    """Takes out of a record what says where it is from.

    places: the dotted keys of what was replaced so far.
    """

    def __init__(self, record: dict[str, Any], run_dir: Path):
        self.places: list[str] = []
        working = record["working_dir"].rstrip("/")
        own = {str(run_dir.absolute()), str(run_dir.resolve())}
        self._folders = sorted({working, *own} - {""}, key=len, reverse=True)
        machines = [record["machine"], *(each["machine"] for each in record["attempts"])]
        hosts = {machine.get("host", "") for machine in machines}
        hosts |= {socket.gethostname(), record["environment"].get(_NODES, "")}
        self._hosts = {name for name in hosts if name}
        owner = _owner(run_dir)
        users = {owner, os.environ.get("USER", ""), *_homes_in(record)}
        self._users = {name for name in users if name not in ("", "root")}

    def value(self, value: Any, place: str = "") -> Any:
        """A JSON value without paths, hosts, people and secrets. place: its dotted key."""
        if isinstance(value, str):
            is_name = place.endswith((".host", f".{_NODES}"))
            text = "[host]" if is_name else self.text(value)
            if text != value:
                self.places.append(place)
            return text
        if isinstance(value, dict):
            return {
                key: below
                if not place and key in _KEPT
                else self.value(below, f"{place}.{key}" if place else key)
                for key, below in value.items()
            }
        if isinstance(value, list):
            return [self.value(below, f"{place}[{index}]") for index, below in enumerate(value)]
        return value

    def text(self, text: str) -> str:
        text, _ = redact(text)
        text = _ABSOLUTE.sub(lambda found: self._path(found[0]), text)
        for names, instead in ((self._hosts, "[host]"), (self._users, "[user]")):
            for name in sorted(names, key=len, reverse=True):
                if len(name) >= _SHORTEST_NAME:
                    text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", instead, text)
        return text

    def _path(self, path: str) -> str:
        for folder in self._folders:
            if path == folder:
                return "."
            if path.startswith(f"{folder}/"):
                return path[len(folder) + 1 :]
        if path.startswith(_OF_EVERY_IMAGE):
            return path
        if _HOME.fullmatch(path):
            return "[path]"
        return f"[path]/{path.rstrip('/').rpartition('/')[2]}"


def _owner(run_dir: Path) -> str:
    try:
        return pwd.getpwuid(run_dir.stat().st_uid).pw_name
    except KeyError:  # Of another machine.
        return ""


def _homes_in(value: Any) -> Iterator[str]:
    """The names of the people whose homes are named anywhere in a record."""
    if isinstance(value, str):
        yield from (name for name in _HOME.findall(value) if name)
    elif isinstance(value, dict):
        for below in value.values():
            yield from _homes_in(below)
    elif isinstance(value, list):
        for below in value:
            yield from _homes_in(below)
