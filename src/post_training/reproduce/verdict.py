"""`post-training reproduce RUN`: from a recorded digest to a verdict.

    plan.py         RUN, or an artifact -> its record, and its files by their bytes
                        -> the image by its digest, every input by its fingerprint
                        -> what this machine can't give again is said
    run_again.py        -> the run, again, in a new folder
    here                -> identical | equivalent | differs: the first difference

With `upstream`, what the inputs were made from is run again first, each run once, back to the
data or as far as it is gone; a later run then gets the reproduced artifacts.
"""

from pathlib import Path
from typing import Any

from post_training.config.model import changed_settings
from post_training.core.errors import ConfigError, PostTrainingError, UsageError, tell
from post_training.core.files import write_json
from post_training.images.rebuild import restore
from post_training.images.share import pull_image
from post_training.images.store import open_store
from post_training.records.compare import Comparison, compare_runs
from post_training.records.run_record import REPRODUCTION_NAME, read_record
from post_training.reproduce.plan import (
    Options,
    Plan,
    StoredImage,
    image_references,
    machine_differences,
    make_plans,
    num_ranks,
    restore_fault,
)
from post_training.reproduce.run_again import run_again

# The exit codes of a verdict.
IDENTICAL, EQUIVALENT, DIFFERS = 0, 3, 4


def reproduce(run: Path, options: Options) -> tuple[int, str]:
    """Run again and compare; the exit code (0 identical, 3 equivalent, 4 differs) and the verdict.

    run: its folder, or what it made.
    Errors: UsageError, ConfigError when the run can't be run again here; PostTrainingError when it
    fails.
    """
    plans = make_plans(run.absolute(), options)
    for plan in plans:
        _print_notes(plan, len(plans) > 1 or options.dry_run)
    if missing := [line for plan in plans for line in plan.missing]:
        raise ConfigError(missing, hint="put this right first; nothing was run")
    new_dirs = [
        _choose_new_dir(plan.run_dir, options.new_dir if plan is plans[-1] else None)
        for plan in plans
    ]
    if options.dry_run:
        for plan, new_dir in zip(plans, new_dirs, strict=True):
            tell(_would_run(plan, new_dir))
        would = f"{len(plans)} runs would be run again"
        return IDENTICAL, would if len(plans) > 1 else "ready to run again"
    made: dict[Path, Path] = {}
    for plan, new_dir in zip(plans, new_dirs, strict=True):
        code, verdict = _run_and_compare(plan, new_dir, made, options)
        if plan is plans[-1]:
            return code, verdict
        tell(f"{plan.record['run_id']}: {verdict}")
        if code != IDENTICAL:
            return code, f"upstream, {plan.record['run_id']} {verdict}"
        made[plan.run_dir] = new_dir
    raise AssertionError("there is always the run itself")


def _print_notes(plan: Plan, is_named: bool) -> None:
    name = f"{plan.record['run_id']}: " if is_named else ""
    for line in plan.notes:
        tell(f"note: {name}{line}")


def _would_run(plan: Plan, new_dir: Path) -> str:
    image = plan.record["image"]
    where = f"as a job at {plan.site[0]}" if plan.site else "here"
    return (
        f"would run {plan.record['run_id']} again in {new_dir}, {where}: world size "
        f"{num_ranks(plan.record)}, image {image['name']} {image['version']} "
        f"{image['oci_digest'][:19]}"
    )


def _choose_new_dir(run_dir: Path, chosen: Path | None) -> Path:
    if chosen is not None:
        if chosen.exists() and any(chosen.iterdir()):
            raise UsageError("the folder is not empty", where=str(chosen))
        return chosen.absolute()
    number = 1
    while (candidate := run_dir.with_name(f"{run_dir.name}-reproduced-{number}")).exists():
        number += 1
    return candidate


def _run_and_compare(
    plan: Plan, new_dir: Path, made: dict[Path, Path], options: Options
) -> tuple[int, str]:
    """The exit code and the verdict, which the new folder keeps."""
    upstream = {key: made[folder] / name for key, (folder, name) in plan.upstream.items()}
    inputs = plan.inputs | upstream
    image = plan.image or fetch_image(plan.record["image"], options)
    tell(f"running {plan.record['run_id']} again in {new_dir}")
    run_again(plan, new_dir, inputs, image, options.repository)
    record = read_record(new_dir)
    changes = machine_differences(plan.record["machine"], record["machine"])
    comparison = compare_runs(plan.record, plan.run_dir, record, new_dir)
    code, verdict = _grade(comparison, changes, options.tolerance)
    packages = changed_settings(plan.record["packages"], record["packages"])
    if code != IDENTICAL and packages:
        verdict += f"; packages: {', '.join(packages)}"
    if code == DIFFERS and plan.record["stage"] == "exec":
        verdict += "; the command, not this project, decides whether its bytes repeat"
    write_json(
        new_dir / REPRODUCTION_NAME,
        {
            "reproduces": plan.record["run_id"],
            "path": str(plan.run_dir),
            "verdict": verdict,
            "machine_differences": changes,
        },
    )
    return code, verdict


def fetch_image(image: dict[str, Any], options: Options) -> StoredImage:
    """Pull the image from where it was pushed to; else build it again from its commit.

    Errors: PostTrainingError when it can neither be pulled nor built.
    """
    store = open_store(options.store)
    try:
        # Fetched for a run upstream, a moment ago.
        return StoredImage(store.find(image["oci_digest"]), store)
    except UsageError:
        pass
    failure: PostTrainingError | None = None
    for reference in image_references(image, options.repository):
        try:
            return StoredImage(pull_image(reference, store, image["oci_digest"]), store)
        except PostTrainingError as error:
            tell(f"warning: {error.where}: {error.problem}")
            failure = error
    if fault := restore_fault(image, options.repository):
        raise PostTrainingError(
            f"the image cannot be pulled, {fault}",
            where=image["oci_digest"],
            hint=failure and failure.hint,
        )
    tell(f"building image {image['oci_digest']} again")
    return StoredImage(restore(image, store, options.repository), store)


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
