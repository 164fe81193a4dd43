"""`post-training pipeline run | submit | status`, and `experiment new`.

PIPELINE/plans/DATE-TIME/plan.json         what was asked for, and the runs that came of it
                         NAME-xxxx.yaml    with `run`: the stages' configurations, whole
PIPELINE/NAME-xxxxxxxx/                    the run folders (slurm/pipeline.py)
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_training.config.load import resolved_yaml
from post_training.config.model import Role, changed_settings, settings_by_role
from post_training.core.errors import Interrupted, PostTrainingError, UsageError, tell
from post_training.core.files import atomic_directory, read_json, write_atomic, write_json
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.core.process import dies_with
from post_training.images.edf import Edf
from post_training.images.identity import can_run_here
from post_training.records.run_record import RECORD_NAME, image_identity, read_record
from post_training.slurm.environment import check_is_mounted, read_environment
from post_training.slurm.pipeline import Plan, PlannedRun, load_pipeline, plan_pipeline
from post_training.slurm.queue import cancel_on_error
from post_training.slurm.runs import RunState, read_queue_of, run_states
from post_training.slurm.site import load_site
from post_training.slurm.submit import Request, preview, submit, submitted_jobs

SCHEMA = "post-training/pipeline/1"
_PLANS = "plans"
_PINNED_IMAGE = "POST_TRAINING_IMAGE_OCI_DIGEST"
_ENVIRONMENT = "post-training"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TEMPLATE = Path(__file__).with_name("experiment_template")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Where:
    """Where a pipeline's stages run.

    environment: the EDF; None for post-training's.
    dev: a checkout to take the sources from.
    site: its name, and what of its scheduler is to be otherwise for every stage.
    """

    environment: str | None
    dev: Path | None = None
    site: tuple[str, Mapping[str, str | int | None]] = ("laptop", {})


def run_pipeline(path: Path, overrides: Sequence[str], where: Where, *, unpinned: bool) -> Plan:
    """Run what is not finished, one stage after another, on this machine; the plan, now finished.

    Errors: PostTrainingError that names the stage that failed; Interrupted.
    """
    plan = plan_pipeline(path, overrides)
    queue = read_queue_of([run.run_dir for run in plan.runs])
    for run in plan.runs:
        if queued := [job_id for job_id in submitted_jobs(run.run_dir) if job_id in queue]:
            raise UsageError(
                f"{run.name} is in Slurm's queue as job {queued[0]}",
                where=str(run.run_dir),
                hint=f"wait for it, or `scancel {' '.join(queued)}`",
            )
    edf = None if can_run_here(where.environment) else _edf(where)
    prefix = _words_before_stage(plan, where, edf)
    image = None if unpinned else (os.environ if edf is None else edf.env).get(_PINNED_IMAGE)
    folder = _write_plan(plan, path)
    for number, run in enumerate(plan.runs, 1):
        title = f"[{number}/{len(plan.runs)}] {run.name}"
        if finished := _finished(run, image):
            tell(f"{title}: {finished}: {run.run_dir}")
            continue
        tell(f"{title}: {run.stage}")
        config = folder / f"{run.run_dir.name}.yaml"
        write_atomic(config, resolved_yaml(run.config))
        words = [*prefix, run.stage, str(config), "--skip-finished"]
        code = _run_stage(words + (["--unpinned"] if unpinned else []))
        if code != 0:
            raise PostTrainingError(
                f"stage {run.name} ended with exit code {code}",
                where=str(run.run_dir),
                hint="the same command goes on from there",
            )
        # A library's own _exit(0) is no success, and no code of the stage's is asked then.
        if not _is_finished(run.run_dir):
            raise PostTrainingError(
                f"stage {run.name} ended with exit code 0, and its run is not finished",
                where=str(run.run_dir),
                hint="the same command goes on from there",
            )
    return plan


def preview_pipeline(
    path: Path, overrides: Sequence[str], where: Where, *, max_failures: int
) -> Iterator[str]:
    """What `submit_pipeline` would queue: each stage's batch script, or that it is finished."""
    plan = plan_pipeline(path, overrides)
    requests = {run.run_dir: _request(plan, run, where, max_failures) for run in plan.runs}
    image = _pinned_image(where)
    for run in plan.runs:
        after = ", ".join(other.name for other in plan.runs if other.run_dir in run.needs)
        yield f"# ==== {run.name}{f', after {after}' if after else ''}"
        if finished := _finished(run, image):
            yield f"# {finished}: {run.run_dir}\n"
        else:
            yield preview(requests[run.run_dir])


def submit_pipeline(
    path: Path, overrides: Sequence[str], where: Where, *, max_failures: int
) -> Path:
    """Queue what is neither finished nor queued, each stage after those it needs; the pipeline's
    folder.

    All or nothing: when one cannot be queued, those queued by this call are cancelled.
    """
    plan = plan_pipeline(path, overrides)
    requests = {run.run_dir: _request(plan, run, where, max_failures) for run in plan.runs}
    image = _pinned_image(where)
    queue = read_queue_of([run.run_dir for run in plan.runs])
    jobs: dict[Path, str] = {}
    queued_now: list[str] = []
    _write_plan(plan, path)
    with cancel_on_error(queued_now):
        for run in plan.runs:
            job_ids = submitted_jobs(run.run_dir)
            if finished := _finished(run, image):
                told = finished
            elif job_ids and job_ids[0] in queue:
                jobs[run.run_dir] = job_ids[0]
                told = f"in the queue already: job {job_ids[0]}"
            else:
                after = tuple(jobs[needed] for needed in run.needs if needed in jobs)
                job_id = submit(requests[run.run_dir].after_jobs(after))
                jobs[run.run_dir] = job_id
                queued_now += submitted_jobs(run.run_dir)
                told = f"job {job_id}" + (f", after {', '.join(after)}" if after else "")
            tell(f"{run.name}: {told}: {run.run_dir}")
    return plan.folder


@dataclass(frozen=True)
class PipelineState:
    """folder: of the pipeline. plan: its newest plan.json. runs: each of the plan's, with how it is
    doing."""

    folder: Path
    plan: dict[str, Any]
    runs: list[tuple[dict[str, Any], RunState]]


def read_pipeline_state(file_or_folder: Path) -> PipelineState:
    """Errors: UsageError when no pipeline was run or submitted there."""
    folder = file_or_folder
    if not folder.is_dir():
        folder = load_pipeline(file_or_folder)[0].config.run_dir
    plans = sorted((folder / _PLANS).glob("*/plan.json"))
    if not plans:
        raise UsageError(
            "no pipeline was run or submitted here",
            where=str(folder),
            hint="`post-training pipeline run FILE` or `pipeline submit FILE` does it",
        )
    plan = read_json(plans[-1], SCHEMA)
    found = run_states([Path(run["run_dir"]) for run in plan["runs"]])
    states = {str(state.run_dir): state for state in found}
    names = {run["run_dir"]: run["name"] for run in plan["runs"]}
    runs = [
        (run, _with_what_is_missing(states[run["run_dir"]], run["needs"], states, names))
        for run in plan["runs"]
    ]
    return PipelineState(folder, plan, runs)


def new_experiment(name: str, parent: Path) -> Path:
    """A folder in `parent` with a pipeline that runs, to be made one's own; its path.

    Errors: UsageError for a name that cannot be, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"must be small letters, digits and hyphens (got {name!r})", where="NAME")
    folder = parent / name
    if folder.exists():
        raise UsageError("there already", where=str(folder), hint="choose another name")
    with atomic_directory(folder) as made:
        for file in sorted(TEMPLATE.iterdir()):
            (made / file.name).write_text(file.read_text().replace("NAME", name))
    return folder


def _edf(where: Where, *, sources_are_here: bool = True, in_registry: bool = False) -> Edf:
    variables = {**os.environ, "PWD": str(Path.cwd())}
    return read_environment(
        where.environment or _ENVIRONMENT,
        variables,
        Path.cwd(),
        sources_are_here=sources_are_here,
        in_registry=in_registry,
    )


def _pinned_image(where: Where) -> str | None:
    # Its mounts are checked as the site has them, when a job is made of it.
    in_registry = load_site(*where.site).launcher.kind == "sarus"
    return _edf(where, sources_are_here=False, in_registry=in_registry).env.get(_PINNED_IMAGE)


def _words_before_stage(plan: Plan, where: Where, edf: Edf | None) -> list[str]:
    """edf: None where the stage runs as this process does."""
    if edf is None:
        return [sys.executable, "-m", "post_training.stages"]
    check_is_mounted(plan.folder, "pipeline's folder", edf)
    development = ["--dev", str(where.dev)] if where.dev else []
    return [
        *(sys.executable, "-m", "post_training.cli", "edf", "run", *development),
        where.environment or _ENVIRONMENT,
        *("--", "entrypoint"),
    ]


def _run_stage(words: Sequence[str]) -> int:
    """The exit code. A signal goes to the stage, which may take its time to end."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=dies_with(os.getpid()))
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        code = process.wait()
    except KeyboardInterrupt:  # The terminal sent it to the stage too.
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code != 0:
        raise Interrupted(signal.Signals(received[0]).name, received[0])
    return 128 - code if code < 0 else code


def _request(plan: Plan, run: PlannedRun, where: Where, max_failures: int) -> Request:
    name, changes = where.site
    site = load_site(name, {**changes, **run.scheduler}).for_stage(
        is_one_a_node=run.config.is_one_a_node
    )
    if site.scheduler.num_tasks > 1:
        run.config.check_ranks(site.scheduler.num_tasks)
    return Request(
        stage=run.stage,
        config=run.config,
        run_dir=run.run_dir,
        site_name=name,
        site=site,
        environment=where.environment or _ENVIRONMENT,
        max_failures=max_failures,
        dev=where.dev and where.dev.absolute(),
        command=sys.argv[1:],
        name=f"{run.name}-{plan.folder.name}",
        num_workers=run.num_workers,
    )


def _finished(run: PlannedRun, image: str | None) -> str | None:
    """What is said of a run that need not run again; None where it must.

    Its folder is named for recipe and inputs, so a topology or an image that is another now is no
    reason to run it, and is told.
    image: OCI digest of the one that it would run in, where it is known.
    Errors: UsageError where an artifact of a finished run is gone.
    """
    if not _is_finished(run.run_dir):
        return None
    record = read_record(run.run_dir)
    for made in record["outputs"]["artifacts"].values():
        if not (run.run_dir / made["path"] / ARTIFACT_RECORD).exists():
            raise UsageError(
                f"{run.name} is finished, but its {made['path']} is gone",
                where=str(run.run_dir),
                hint="remove the folder, and it is made again",
            )
    then = record["topology"]
    # What is left open is as the machine has it.
    asked = {
        key: value
        for key, value in settings_by_role(run.config)[Role.TOPOLOGY].items()
        if value is not None and key in then
    }
    others = []
    if changed := changed_settings({key: then[key] for key in asked}, asked):
        others.append(f"with another topology ({'; '.join(changed)})")
    made_in = image_identity(record["image"])["oci_digest"]
    if image is not None and made_in != image:
        others.append(f"of another image ({made_in[:19]} -> {image[:19]})")
    return f"finished, and kept, {' and '.join(others)}" if others else "unchanged, and finished"


def _is_finished(run_dir: Path) -> bool:
    return (run_dir / RECORD_NAME).exists() and read_record(run_dir)["status"] == "finished"


def _write_plan(plan: Plan, path: Path) -> Path:
    """PIPELINE/plans/DATE-TIME, with the plan in it."""
    now = datetime.now(UTC)
    folder = plan.folder / _PLANS / f"{now:%Y%m%d-%H%M%S-%f}"
    record = {
        "schema": SCHEMA,
        "file": str(path.absolute()),
        "command": ["post-training", *sys.argv[1:]],
        "working_dir": str(Path.cwd()),
        "time": now.isoformat(timespec="seconds"),
        "runs": [
            {
                "name": run.name,
                "stage": run.stage,
                "run_dir": str(run.run_dir),
                "needs": [str(needed) for needed in run.needs],
                "num_workers": run.num_workers,
            }
            for run in plan.runs
        ],
    }
    write_json(folder / "plan.json", record)
    return folder


def _with_what_is_missing(
    state: RunState, needs: Sequence[str], states: dict[str, RunState], names: dict[str, str]
) -> RunState:
    """A run that was not opened says what it waits for."""
    missing = [names[needed] for needed in needs if states[needed].state != "finished"]
    if state.state in ("waiting", "ended", "not started") and missing:
        changes: dict[str, Any] = {"reason": f"needs {', '.join(missing)}"}
        if state.state == "ended":
            changes["state"] = "not started"
        return RunState(**{**vars(state), **changes})
    return state
