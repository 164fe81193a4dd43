"""`post-training reproduce RUN`: from a recorded digest to a verdict.

    RUN, or an artifact -> its record -> the image by its digest, every input by its fingerprint
        -> what this machine can't give again is said -> the run, again, in a new folder
        -> identical | equivalent | differs: the first difference

With `upstream`, what the inputs were made from is run again first, each run once, back to the data;
a later run then gets the reproduced artifacts.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.files import write_json
from post_training.core.hashing import ARTIFACT_RECORD, fingerprint
from post_training.images.commands import open_store
from post_training.images.store import ImageStore
from post_training.images.verify import check_image_digest
from post_training.records.artifact import read_artifact
from post_training.records.compare import Comparison, compare_runs
from post_training.records.machine import machine
from post_training.records.run_record import RECORD_NAME, is_edited, read_record
from post_training.records.show import EDITED
from post_training.reproduce.run_again import run_again

IDENTICAL, EQUIVALENT, DIFFERS = 0, 3, 4
_MACHINE = ("architecture", "processor", "accelerators", "driver")


@dataclass(frozen=True)
class Options:
    """new_dir: None: beside the run. tolerance: of the figures, relative, on another machine."""

    new_dir: Path | None = None
    store: Path | None = None
    upstream: bool = False
    dry_run: bool = False
    tolerance: float = 0.01


@dataclass(frozen=True)
class _Plan:
    """upstream: {key of an input: (run folder that made it, where in it)}, if they are to be run
    again as well. missing: what stands in the way."""

    run_dir: Path
    record: dict[str, Any]
    image: dict[str, Any] | None
    upstream: dict[str, tuple[Path, Path]]
    changes: list[str]
    missing: list[str] = field(default_factory=list)


def reproduce(run: Path, options: Options) -> int:
    """Exit code: 0 identical, 3 equivalent, 4 differs. Errors: UsageError, ConfigError when the run
    can't be run again here; PostTrainingError when it fails."""
    store = open_store(options.store)
    plans = _plans(_run_folder(run.absolute()), store, options)
    for plan in plans:
        _tell(plan, len(plans) > 1 or options.dry_run)
    if missing := [line for plan in plans for line in plan.missing]:
        raise ConfigError(missing, hint="restore them; nothing was run")
    if options.dry_run:
        print(f"{len(plans)} runs would be run again" if len(plans) > 1 else "ready to run again")
        return IDENTICAL
    made: dict[Path, Path] = {}
    for plan in plans:
        new_dir = _choose_new_dir(plan.run_dir, options.new_dir if plan is plans[-1] else None)
        comparison = _run(plan, new_dir, made, store)
        code, verdict = _grade(comparison, plan.changes, options.tolerance)
        _keep_verdict(plan, new_dir, verdict)
        if plan is plans[-1]:
            print(verdict)
        else:
            print(f"{plan.record['run_id']}: {verdict}", file=sys.stderr)
        if code != IDENTICAL:
            if plan is not plans[-1]:
                print(f"upstream, {plan.record['run_id']} {verdict}")
            return code
        made[plan.run_dir] = new_dir
    return IDENTICAL


def _run_folder(path: Path) -> Path:
    """Of a run, or of what it made."""
    if (path / RECORD_NAME).exists() or not (path / ARTIFACT_RECORD).exists():
        return path
    return _maker(path, read_artifact(path)["made_by"]["run_id"])


def _maker(path: Path, run_id: str) -> Path:
    """The run folder above an artifact. Errors: UsageError when it is gone."""
    for folder in path.parents:
        if (folder / RECORD_NAME).exists() and read_record(folder)["run_id"] == run_id:
            return folder
    raise UsageError(f"the folder of run {run_id}, which made it, is gone", where=str(path))


def _plans(run_dir: Path, store: ImageStore, options: Options) -> list[_Plan]:
    """What has to run, in its order: the run itself is the last."""
    plans: dict[Path, _Plan] = {}

    def visit(run_dir: Path) -> None:
        if run_dir in plans:
            return
        plan = _plan(run_dir, store, upstream=options.upstream)
        for folder, _ in plan.upstream.values():
            visit(folder)
        plans[run_dir] = plan

    visit(run_dir)
    return list(plans.values())


def _plan(run_dir: Path, store: ImageStore, *, upstream: bool) -> _Plan:
    record = read_record(run_dir)
    _check_reproducible(record, run_dir)
    makers, missing, image = {}, [], None
    for key, value in record["inputs"].items():
        path = Path(value["path"])
        if upstream and "made_by" in value:
            folder = _maker(path, value["made_by"]["run_id"])
            makers[key] = (folder, path.relative_to(folder))
        elif fault := _input_fault(path, value["fingerprint"]):
            missing.append(f"{key}: {fault}")
    try:
        image = _find_image(record, store)
    except PostTrainingError as error:
        missing.append(str(error))
    changes = _machine_differences(record["machine"], machine())
    return _Plan(run_dir, record, image, makers, changes, missing)


def _tell(plan: _Plan, is_named: bool) -> None:
    name = f"{plan.record['run_id']}: " if is_named else ""
    if is_edited(plan.record):
        print(f"warning: {name}{EDITED}", file=sys.stderr)
    for line in plan.changes:
        print(f"note: {name}{line}", file=sys.stderr)


def _check_reproducible(record: dict[str, Any], run_dir: Path) -> None:
    if record["status"] != "finished":
        raise UsageError(f"the run is not finished (it is {record['status']})", where=str(run_dir))
    if record["image"] is None:
        raise UsageError("the run was unpinned: no image digest is recorded", where=str(run_dir))
    if not record["reproducible_by_digest"]:
        raise UsageError(
            "the run used a development mount, so its image digest is not all of its code",
            where=str(run_dir),
            hint=f"check out {record['code'].get('commit')}, apply the recorded diff, and run it",
        )


def _find_image(record: dict[str, Any], store: ImageStore) -> dict[str, Any]:
    """The stored image of the recorded OCI digest, verified; the very file if it is there."""
    wanted = record["image"]
    exact = store.image_path(wanted["sqsh_sha256"])
    image = store.find(wanted["sqsh_sha256"] if exact.exists() else wanted["oci_digest"])
    check_image_digest(store.image_path(image["sqsh_sha256"]), image["sqsh_sha256"])
    return image


def _input_fault(path: Path, recorded: str) -> str | None:
    try:
        found = fingerprint(path)
    except FileNotFoundError:
        return f"gone: {path}"
    if found == recorded:
        return None
    return f"changed: {path} (fingerprint is {found[:12]}, the run had {recorded[:12]})"


def _choose_new_dir(run_dir: Path, chosen: Path | None) -> Path:
    if chosen is not None:
        if chosen.exists() and any(chosen.iterdir()):
            raise UsageError("the folder is not empty", where=str(chosen))
        return chosen.absolute()
    number = 1
    while (candidate := run_dir.with_name(f"{run_dir.name}-reproduced-{number}")).exists():
        number += 1
    return candidate


def _run(plan: _Plan, new_dir: Path, made: dict[Path, Path], store: ImageStore) -> Comparison:
    assert plan.image is not None
    inputs = {key: Path(value["path"]) for key, value in plan.record["inputs"].items()}
    inputs |= {key: made[folder] / name for key, (folder, name) in plan.upstream.items()}
    print(f"running {plan.record['run_id']} again in {new_dir}", file=sys.stderr)
    run_again(plan.record, plan.run_dir, new_dir, inputs, plan.image, store)
    return compare_runs(plan.record, plan.run_dir, read_record(new_dir), new_dir)


def _grade(comparison: Comparison, changes: list[str], tolerance: float) -> tuple[int, str]:
    """The exit code and the verdict. Other bits are forgiven on another machine alone, and there
    only where figures say how far they are off."""
    if comparison.difference is None:
        return IDENTICAL, comparison.verdict
    deviation = comparison.deviation
    if not changes or not comparison.num_metric_lines or deviation is None or deviation > tolerance:
        return DIFFERS, comparison.verdict
    return EQUIVALENT, (
        f"equivalent: the figures are off by at most {deviation:.1e} (tolerance {tolerance:g}, "
        f"relative) where {'; '.join(changes)}; first difference: {comparison.difference}"
    )


def _keep_verdict(plan: _Plan, new_dir: Path, verdict: str) -> None:
    write_json(
        new_dir / "reproduction.json",
        {
            "reproduces": plan.record["run_id"],
            "path": str(plan.run_dir),
            "verdict": verdict,
            "machine_differences": plan.changes,
        },
    )


def _machine_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What cannot be had again here and may change bits."""
    return [
        f"{key} was {then[key]!r}, here it is {now[key]!r}"
        for key in _MACHINE
        if key in then and then[key] != now[key]
    ]
