"""An artifact: a folder (model, dataset) with artifact.json, which is written last.

    fingerprint     over its files without artifact.json: what it is
    lineage_hash    over the recipe that made it and, of each input, its lineage_hash (or its
                    fingerprint, where nobody knows what made it): what it was meant to be
    made_by         a copy of the run's record, so that lineage outlives the run folder

A run's record names what made each input (`origin_of`), so an artifact knows all its ancestors.
"""

from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import check_keys, read_json, write_json
from post_training.core.hashing import ARTIFACT_RECORD, fingerprint_files, hash_files, sha256_value
from post_training.records.run_record import record_faults, seal

SCHEMA = "post-training/artifact/1"
FETCHED = "fetch"  # in the place of the stage that made it
_KEYS = ("kind", "fingerprint", "files", "made_by")
_KEYS_OF_MAKER = {"run_id", "stage", "recipe", "recipe_hash", "inputs", "image"}


def seal_artifact(folder: Path, kind: str, run_record: dict[str, Any]) -> dict[str, Any]:
    """Fingerprint the folder's files and write artifact.json; returns what it says.

    Errors: PostTrainingError when the folder is missing or empty.
    """
    files = hash_files(folder) if folder.is_dir() else {}
    if not files:
        raise PostTrainingError(f"the stage left no {kind}", where=str(folder))
    artifact = {
        "schema": SCHEMA,
        "kind": kind,
        "fingerprint": fingerprint_files(files),
        "lineage_hash": _lineage_hash(kind, run_record),
        "files": files,
        "made_by": run_record,
    }
    write_json(folder / ARTIFACT_RECORD, artifact)
    return artifact


def seal_fetched(folder: Path, kind: str, source: dict[str, str]) -> dict[str, Any]:
    """artifact.json of what no run made: it was fetched. source: from where, all that counts."""
    record = {
        "run_id": f"fetched {' '.join(source.values())}",
        "stage": FETCHED,
        "recipe": source,
        "recipe_hash": sha256_value({"stage": FETCHED, "recipe": source}),
        "inputs": {},
        "image": None,
    }
    return seal_artifact(folder, kind, {**record, "seal": seal(record)})


def read_artifact(folder: Path) -> dict[str, Any]:
    """What artifact.json says. Errors: UsageError when there is none, or keys of it are gone."""
    try:
        artifact = read_json(folder / ARTIFACT_RECORD, SCHEMA)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError("no artifact: there is no artifact.json", where=str(folder)) from None
    check_keys(artifact, _KEYS, folder / ARTIFACT_RECORD)
    made_by = artifact["made_by"]
    if not (
        isinstance(artifact["files"], dict)
        and isinstance(made_by, dict)
        and made_by.keys() >= _KEYS_OF_MAKER
        and isinstance(made_by["inputs"], dict)
    ):
        raise UsageError("no record any more: it is damaged", where=str(folder / ARTIFACT_RECORD))
    # The first artifacts had none.
    artifact.setdefault("lineage_hash", _lineage_hash(artifact["kind"], artifact["made_by"]))
    return artifact


def read_artifact_of_run(folder: Path) -> dict[str, Any]:
    """The same. Errors: also UsageError for what was fetched, and no run made."""
    artifact = read_artifact(folder)
    if artifact["made_by"]["stage"] == FETCHED:
        raise UsageError(f"no run made it: {artifact['made_by']['run_id']}", where=str(folder))
    return artifact


def artifact_record_faults(artifact: dict[str, Any]) -> list[str]:
    """How artifact.json is not as it was written, a line each; check.py looks at the files."""
    faults = []
    if artifact["fingerprint"] != fingerprint_files(artifact["files"]):
        faults.append("fingerprint is not that of its list of files")
    faults += [f"made_by: {fault}" for fault in record_faults(artifact["made_by"])]
    if artifact["lineage_hash"] != _lineage_hash(artifact["kind"], artifact["made_by"]):
        faults.append("lineage_hash is not that of what made it")
    return faults


def origin_of(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What made an input with this fingerprint; None for what is no artifact, nor a file in one.

    {"kind", "lineage_hash", "run_id", "stage", "recipe_hash", "image": OCI digest or None,
     "inputs": {key: {"path", "fingerprint", "made_by": the same again, where it is known}},
     "licences": as the record has them, where it has any}
    Errors: UsageError for an artifact that was changed after it was made, or its record.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / ARTIFACT_RECORD).exists():
        return None
    artifact = read_artifact(folder)
    recorded = artifact["fingerprint"] if path.is_dir() else artifact["files"].get(path.name)
    if recorded is None:
        return None
    if recorded != fingerprint:
        raise UsageError(
            f"was changed after run {artifact['made_by']['run_id']} made it",
            where=str(path),
            hint="`post-training artifact verify` names the files; without its artifact.json it "
            "counts as files of your own",
        )
    record = artifact["made_by"]
    if faults := record_faults(record):
        raise UsageError(
            f"the record of run {record['run_id']} in it: {faults[0]}",
            where=str(folder / ARTIFACT_RECORD),
            hint="put the original back; without it the folder counts as files of your own",
        )
    return {
        "kind": artifact["kind"],
        "lineage_hash": artifact["lineage_hash"],
        **{name: record[name] for name in ("run_id", "stage", "recipe_hash")},
        "image": record["image"] and record["image"]["oci_digest"],
        "inputs": record["inputs"],
        **({"licences": record["licences"]} if "licences" in record else {}),
    }


def _lineage_hash(kind: str, record: dict[str, Any]) -> str:
    inputs = {
        key: value["made_by"]["lineage_hash"] if "made_by" in value else value["fingerprint"]
        for key, value in record["inputs"].items()
    }
    content = {"stage": record["stage"], "recipe": record["recipe"], "inputs": inputs}
    return sha256_value({"kind": kind, **content})
