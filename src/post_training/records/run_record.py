"""run.json as it lies in a run folder: read, checked, and told from another.

    identity    sha256 over what determines the results: equal for two runs that must have the same
    seal        sha256 over all the rest: an edit by hand is noticed, and no more than that

Written by records/run.py.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.files import check_keys, read_json
from post_training.core.hashing import sha256_value

SCHEMA = "post-training/run-record/1"
RECORD_NAME = "run.json"
CONFIG_NAME = "config.yaml"
# Of training stages: a line now and then, for people; a line a step, for comparison.
METRICS_NAME = "metrics.jsonl"
STEPS_NAME = "steps.jsonl"
# Of a run that `reproduce` made: the verdict.
REPRODUCTION_NAME = "reproduction.json"
# What every record has, from the first version on.
_KEYS = {
    "run_id",
    "status",
    "reason",
    "stage",
    "identity",
    "recipe",
    "topology",
    "inputs",
    "image",
    "command",
    "working_dir",
    "recipe_hash",
    "placement",
    "code",
    "reproducible_by_digest",
    "mounts",
    "environment",
    "machine",
    "scheduler_job",
    "packages",
    "attempts",
    "outputs",
    "metrics",
}
_MAPPINGS = (
    *("recipe", "topology", "placement", "code"),
    *("environment", "machine", "packages", "metrics"),
)
_KEYS_OF_ATTEMPT = {"status", "reason", "started", "ended", "scheduler_job"}
# Neither these nor a seal did the first version write.
_SINCE_THE_FIRST = ("debug", "mounted_over")


def read_record(run_dir: Path) -> dict[str, Any]:
    """The record of a run folder; what it should hold may be gone. Errors: UsageError."""
    path = run_dir / RECORD_NAME
    try:
        record = read_json(path, SCHEMA)
    except FileNotFoundError:
        raise UsageError("no run here: there is no run.json", where=str(run_dir)) from None
    except NotADirectoryError:
        raise UsageError("a file, and not the folder of a run", where=str(run_dir)) from None
    return record


def read_whole_record(run_dir: Path) -> dict[str, Any]:
    """The same with all that every record has. Errors: UsageError that names what is not there."""
    record, path = read_record(run_dir), run_dir / RECORD_NAME
    check_keys(record, sorted(_KEYS), path)
    outputs, inputs, attempts = record["outputs"], record["inputs"], record["attempts"]
    kinds = {
        **{key: isinstance(record[key], dict) for key in _MAPPINGS},
        **{key: isinstance(record[key], str) for key in ("run_id", "status", "stage")},
        **{key: isinstance(record[key], list) for key in ("command", "mounts")},
        "inputs": isinstance(inputs, dict) and _are_all(inputs.values(), {"path", "fingerprint"}),
        "image": record["image"] is None or _are_all([record["image"]], {"oci_digest"}),
        "attempts": isinstance(attempts, list) and _are_all(attempts, _KEYS_OF_ATTEMPT, 1),
        "outputs": outputs is None
        or (
            _are_all([outputs], {"artifacts", "files"})
            and isinstance(outputs["files"], dict)
            and isinstance(outputs["artifacts"], dict)
            and _are_all(outputs["artifacts"].values(), {"path", "fingerprint"})
        ),
    }
    if wrong := [key for key, is_right in kinds.items() if not is_right]:
        raise UsageError(f"no record any more: {', '.join(wrong)} is damaged", where=str(path))
    return record


@dataclass(frozen=True)
class Verdict:
    """What a reproduction gave. whose: `run again in FOLDER`. said: `differs: …`, in full."""

    whose: str
    said: str

    @property
    def grade(self) -> str:
        """identical, equivalent or differs: the first word."""
        return re.split(r"\W", self.said, maxsplit=1)[0]

    @property
    def detail(self) -> str:
        """What is said after it: how much was compared, or the first difference."""
        return self.said.removeprefix(self.grade).lstrip(":; ")

    def __str__(self) -> str:
        return f"{self.whose}: {self.said}"


def read_verdicts(run_dir: Path, run_id: str) -> list[Verdict]:
    """Of this run as a reproduction of another, and of those beside it that repeated it. A file
    that is no verdict says nothing."""
    folder = run_dir.absolute()
    own = _read_verdict(folder / REPRODUCTION_NAME)
    found = [Verdict(f"as a reproduction of {own['reproduces']}", own["verdict"])] if own else []
    for path in sorted(folder.parent.glob(f"*/{REPRODUCTION_NAME}")):
        said = None if path.parent == folder else _read_verdict(path)
        if said and said["reproduces"] == run_id:
            machine = "; another machine" if said.get("machine_differences") else ""
            found.append(Verdict(f"run again in {path.parent.name}", said["verdict"] + machine))
    return found


def _read_verdict(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    is_whole = (
        isinstance(said, dict)
        and {"reproduces", "verdict"} <= said.keys()
        and isinstance(said["verdict"], str)
    )
    return said if is_whole else None


def _are_all(values: Collection[Any], keys: set[str], least: int = 0) -> bool:
    """Whether all, and at least so many, are mappings with these keys."""
    return len(values) >= least and all(
        isinstance(value, dict) and value.keys() >= keys for value in values
    )


def record_faults(record: dict[str, Any]) -> list[str]:
    """How somebody changed the record since it was written, a line each: a slip of the hand is
    noticed, and no more than that."""
    faults = []
    if "seal" not in record:
        if not is_of_first_version(record):
            faults.append("was changed by hand (its seal is gone)")
    elif record["seal"] != seal(record):
        faults.append("was changed by hand (its seal is of something else)")
    if "identity" in record:
        try:
            fits = record["identity"] == identity_of(record)
        except (LookupError, TypeError, AttributeError):
            fits = False
        if not fits:
            faults.append("identity is not that of its recipe, topology, inputs and image")
    return faults


def is_of_first_version(record: dict[str, Any]) -> bool:
    """Whether it never had a seal."""
    return "seal" not in record and not any(key in record for key in _SINCE_THE_FIRST)


def seal(record: dict[str, Any]) -> str:
    """Over all the rest: whoever computes it again may write it, so it is no signature."""
    return sha256_value({key: value for key, value in record.items() if key != "seal"})


def identity_of(record: dict[str, Any]) -> str:
    """Of a record, or of what one is made from."""
    return sha256_value(
        {
            **{key: record[key] for key in ("stage", "recipe", "topology")},
            "inputs": fingerprints(record["inputs"]),
            "image": record["image"] and record["image"]["oci_digest"],
        }
    )


def fingerprints(inputs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """{key: fingerprint} of a record's inputs."""
    return {key: value["fingerprint"] for key, value in inputs.items()}


def image_identity(image: dict[str, Any] | None) -> dict[str, str]:
    """Of a record's image, what decides the bits."""
    return {"oci_digest": image["oci_digest"] if image else "unpinned"}
