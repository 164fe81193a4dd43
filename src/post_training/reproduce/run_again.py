"""Run a recorded run again: its configuration, seeds, threads, number of processes, environment;
on this machine, or as a job of a site's scheduler.

Its inputs are seen read-only; the new folder is the one place that can be written to.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.config.load import load_config
from post_training.config.model import changed_settings
from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.files import write_atomic, write_json
from post_training.images.rebuild import restore
from post_training.images.store import open_store
from post_training.records.compare import Comparison, compare_runs
from post_training.records.run_record import CONFIG_NAME, RECORD_NAME, read_record
from post_training.reproduce.plan import (
    HERE,
    Options,
    Plan,
    StoredImage,
    machine_differences,
    make_plans,
    num_ranks,
    reproduction_edf,
    site_surroundings,
)
from post_training.slurm.queue import wait_for
from post_training.slurm.site import Site
from post_training.slurm.submit import Request, print_job_and_log, submit
from post_training.stages.registry import find_stage

_MAX_FAILURES = 3


def run_again(
    record: dict[str, Any],
    run_dir: Path,
    new_dir: Path,
    inputs: Mapping[str, Path],
    image: StoredImage,
    site: tuple[str, Site] | None,
    repository: Path,
) -> None:
    """Run what `record` of `run_dir` says in `new_dir`. inputs: where each input is now. site: its
    name and settings, to run there as a job of as many ranks; None: here. repository: has the
    sites' EDFs.

    Errors: PostTrainingError when it fails.
    """
    new_dir.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(record, new_dir, inputs)
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        edf = Path(temporary) / "reproduce.toml"
        around = HERE if site is None else site_surroundings(record, run_dir, repository)
        takes_sif = site is not None and site[1].launcher.kind == "singularity"
        path = image.sif if takes_sif else image.squashfs
        text = reproduction_edf(record, run_dir, new_dir, inputs, (image, path), around)
        write_atomic(edf, text)
        if site is None:
            _run_here(record, run_dir, new_dir, settings, edf)
            return
        request = _request(record, run_dir, new_dir, settings, edf, site)
        job_id = submit(request)
    print_job_and_log(request, job_id)
    wait_for(job_id)
    if not (new_dir / RECORD_NAME).exists() or read_record(new_dir)["status"] != "finished":
        raise PostTrainingError(
            f"job {job_id} did not finish the run",
            where=str(new_dir),
            hint=f"`post-training runs logs {new_dir}` shows why",
        )


def _run_here(
    record: dict[str, Any], run_dir: Path, new_dir: Path, settings: dict[str, Any], edf: Path
) -> None:
    command = [
        sys.executable, "-m", "post_training.cli", "edf", "run", str(edf), "--",
        "entrypoint", record["stage"], str(run_dir / CONFIG_NAME), *_overrides(settings),
    ]  # fmt: skip
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise PostTrainingError(f"the run failed again with exit code {code}", where=str(new_dir))


def _request(
    record: dict[str, Any],
    run_dir: Path,
    new_dir: Path,
    settings: dict[str, Any],
    edf: Path,
    named_site: tuple[str, Site],
) -> Request:
    site_name, site = named_site
    if site.scheduler.num_tasks > 1:
        settings = {**settings, "num_processes": None}  # The launcher starts them.
    stage = find_stage(record["stage"])
    overrides = _overrides(settings)
    config = load_config(stage.load_config_class(), run_dir / CONFIG_NAME, overrides)
    return Request(
        stage=stage.name,
        config=config,
        run_dir=new_dir,
        site_name=site_name,
        site=site,
        environment=str(edf),
        max_failures=_MAX_FAILURES,
        command=sys.argv[1:],
    )


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    # JSON is YAML: text stays text, whatever it looks like.
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _settings(record: dict[str, Any], new_dir: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What the configuration left open or relative, as it was."""
    return {
        "run_dir": str(new_dir),
        "num_processes": num_ranks(record),
        "num_threads": record["topology"]["num_threads"],
        **_folders(record),
        **_reported_to_nobody(record),
        **{key: str(path) for key, path in inputs.items()},
    }


def _folders(record: dict[str, Any]) -> dict[str, str | None]:
    """The data is prepared anew, not found in a cache; fetched datasets are where they were. Models
    for inference are in the new folder, not where those of the run are."""
    placement = record["placement"]
    anew = ("data.cache_dir", "checkpointing.inference_checkpoint_path")
    folders: dict[str, str | None] = {key: None for key in anew if placement.get(key) is not None}
    if (hub_dir := placement.get("data.hub_dir")) is not None:
        folders["data.hub_dir"] = str(Path(record["working_dir"]) / hub_dir)
    return folders


def _reported_to_nobody(record: dict[str, Any]) -> dict[str, list[str]]:
    """A reproduction is no further run on anybody's dashboard."""
    return {"logging.report_to": []} if record["placement"].get("logging.report_to") else {}


# `post-training reproduce RUN`: from a recorded digest to a verdict.
#
#     RUN, or an artifact -> its record, and its files by their bytes
#         -> the image by its digest, every input by its fingerprint
#         -> what this machine can't give again is said -> the run, again, in a new folder
#         -> identical | equivalent | differs: the first difference
#
# With `upstream`, what the inputs were made from is run again first, each run once, back to the
# data or as far as it is gone; a later run then gets the reproduced artifacts.


IDENTICAL, EQUIVALENT, DIFFERS = 0, 3, 4


def reproduce(run: Path, options: Options) -> int:
    """Exit code: 0 identical, 3 equivalent, 4 differs. Errors: UsageError, ConfigError when the run
    can't be run again here; PostTrainingError when it fails."""
    plans = make_plans(run.absolute(), options)
    for plan in plans:
        _tell(plan, len(plans) > 1 or options.dry_run)
    if missing := [line for plan in plans for line in plan.missing]:
        raise ConfigError(missing, hint="put this right first; nothing was run")
    new_dirs = [
        _choose_new_dir(plan.run_dir, options.new_dir if plan is plans[-1] else None)
        for plan in plans
    ]
    if options.dry_run:
        for plan, new_dir in zip(plans, new_dirs, strict=True):
            print(_would_run(plan, new_dir), file=sys.stderr)
        print(f"{len(plans)} runs would be run again" if len(plans) > 1 else "ready to run again")
        return IDENTICAL
    made: dict[Path, Path] = {}
    for plan, new_dir in zip(plans, new_dirs, strict=True):
        code, verdict = _run(plan, new_dir, made, options)
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


def _tell(plan: Plan, is_named: bool) -> None:
    name = f"{plan.record['run_id']}: " if is_named else ""
    for line in plan.notes:
        print(f"note: {name}{line}", file=sys.stderr)


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


def _run(plan: Plan, new_dir: Path, made: dict[Path, Path], options: Options) -> tuple[int, str]:
    """The exit code and the verdict, which the new folder keeps."""
    upstream = {key: made[folder] / name for key, (folder, name) in plan.upstream.items()}
    inputs = plan.inputs | upstream
    image = plan.image or _restored(plan.record["image"], options)
    print(f"running {plan.record['run_id']} again in {new_dir}", file=sys.stderr)
    run_again(plan.record, plan.run_dir, new_dir, inputs, image, plan.site, options.repository)
    record = read_record(new_dir)
    changes = machine_differences(plan.record["machine"], record["machine"])
    comparison = compare_runs(plan.record, plan.run_dir, record, new_dir)
    code, verdict = _grade(comparison, changes, options.tolerance)
    packages = changed_settings(plan.record["packages"], record["packages"])
    if code != IDENTICAL and packages:
        verdict += f"; packages: {', '.join(packages)}"
    write_json(
        new_dir / "reproduction.json",
        {
            "reproduces": plan.record["run_id"],
            "path": str(plan.run_dir),
            "verdict": verdict,
            "machine_differences": changes,
        },
    )
    return code, verdict


def _restored(image: dict[str, Any], options: Options) -> StoredImage:
    store = open_store(options.store)
    try:
        record = store.find(image["oci_digest"])  # Built for a run upstream, a moment ago.
    except UsageError:
        print(f"building image {image['oci_digest']} again", file=sys.stderr)
        record = restore(image, store, options.repository)
    return StoredImage(record, store)


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
