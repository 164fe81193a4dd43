"""`post-training submit`: all that the job reads is written into RUN/slurm, then it is queued.

RUN/slurm/config.yaml        the whole configuration, defaults and overrides in it
          environment.toml   the EDF with the image's digest, its parents in it
          job.sh             the batch script
          workers.sh         that of the array which goes before it and shares the chunks
          dev/ dev.json      with --dev: the sources, and their commit and diff
          chain              the ids of a chain's jobs, in order
          submission.json    the jobs' ids and who asked for them, with what
          slurm-ID.out       what a job prints, all attempts one after another
          failures.json      failures since the last progress (slurm/outcome.py)

A submission is whole or there is none: when a step of it fails, the jobs that are queued already
are cancelled. Of a `submit` that was killed the queue still knows: its job is found there by the
path of its script, and the folder is not queued twice.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from post_training.config.load import load_config, resolved_yaml
from post_training.config.model import Config
from post_training.core.errors import (
    ConfigError,
    NoAnswerError,
    PostTrainingError,
    UsageError,
    tell,
)
from post_training.core.files import copy_folder, read_json, write_atomic, write_json
from post_training.core.locks import hold
from post_training.core.process import run_tool
from post_training.core.secrets import find_secret
from post_training.images.checkout import describe_changes
from post_training.images.edf import Edf
from post_training.images.edf_check import secret_faults
from post_training.records.run import LAUNCH_FOLDER, earlier_record, is_live
from post_training.slurm.environment import (
    check_is_mounted,
    check_site,
    development_mounts,
    frozen_edf,
    read_environment,
)
from post_training.slurm.outcome import TALLY_NAME, current_tally, write_tally
from post_training.slurm.queue import (
    ask_slurm,
    cancel_on_error,
    read_queue,
    slurm_environment,
)
from post_training.slurm.script import Container, Job, sbatch_script
from post_training.slurm.site import Site, load_site
from post_training.stages.config import StageConfig
from post_training.stages.registry import find_stage

SCHEMA = "post-training/submission/1"
SUBMISSION_NAME = "submission.json"
# sbatch itself asks a busy controller again for two minutes, and then says so.
_SBATCH_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    stage: its name.
    config: its settings, all of them, with an absolute run_dir.
    site: whose scheduler and launcher are used.
    environment: the name or path of an EDF.
    max_failures: how many failures without progress in between may be tried again.
    dev: a checkout whose sources are copied and run in place of the image's.
    command: as it was typed.
    name: of the job, in the queue.
    after: jobs that must have succeeded before.
    num_workers: tasks of an array that share the chunks, before the job that puts them together.
    num_chained: jobs of which each goes on where the one before it was stopped.
    is_vetted: the nodes are looked at before the stage starts.
    """

    stage: str
    config: Config
    run_dir: Path
    site_name: str
    site: Site
    environment: str
    max_failures: int
    dev: Path | None = None
    command: Sequence[str] = ()
    name: str | None = None
    after: tuple[str, ...] = ()
    num_workers: int | None = None
    num_chained: int = 1
    is_vetted: bool = False

    def after_jobs(self, job_ids: tuple[str, ...]) -> "Request":
        return replace(self, after=job_ids)


def make_request(
    stage_name: str,
    config_path: Path,
    overrides: Sequence[str],
    site: tuple[str, Mapping[str, str | int | None]],
    environment: str,
    *,
    max_failures: int,
    dev: Path | None,
    num_chained: int,
    is_vetted: bool = False,
) -> Request:
    """The request to run a stage as a job, for `submit` or `preview`.

    site: its name, and what of its scheduler is to be otherwise.
    Errors: UsageError, ConfigError.
    """
    site_name, changes = site
    stage = find_stage(stage_name)
    config = load_config(stage.load_config_class(), config_path, overrides)
    loaded = load_site(site_name, changes).for_stage(is_one_a_node=config.is_one_a_node)
    run_dir = _run_dir(config, config_path)
    if num_chained > 1 and not config.continues:
        raise UsageError(
            f"--chain: {stage.name} begins over each time it is stopped",
            hint="give it the --time that it needs",
        )
    if loaded.scheduler.num_tasks > 1:
        config.check_ranks(loaded.scheduler.num_tasks)
    return Request(
        stage=stage.name,
        config=config.model_copy(update={"run_dir": run_dir}),
        run_dir=run_dir,
        site_name=site_name,
        site=loaded,
        environment=environment,
        max_failures=max_failures,
        dev=dev and dev.absolute(),
        command=sys.argv[1:],
        num_chained=num_chained,
        is_vetted=is_vetted,
    )


def _run_dir(config: StageConfig, config_path: Path) -> Path:
    if config.run_dir is None:
        # The entrypoint names it for the content of the inputs, which may be terabytes.
        raise UsageError(
            "run_dir is not set, and a submitted run needs one",
            where=str(config_path),
            hint="give run_dir=runs/NAME",
        )
    if config.debug.override_existing:
        raise UsageError(
            "debug.override_existing: a requeued job would remove its own checkpoints",
            where=str(config_path),
            hint="remove the trial's folder and leave the setting out",
        )
    # Where links lead: the job's folder is the resolved one too.
    return config.run_dir.resolve()


def preview(request: Request) -> str:
    """The files that `submit` would write, as a text; nothing is written or queued."""
    files = _files_to_write(request)
    _check_free(request.run_dir)
    folder = request.run_dir / LAUNCH_FOLDER
    return "\n".join(f"# ---- {folder / name}\n{text}" for name, text in files.items())


def submit(request: Request) -> str:
    """Write the files and queue the job; its id, the last one's where workers go before it.

    Errors: UsageError when the run folder is taken; PostTrainingError when Slurm refuses; OSError
    when the jobs' ids can't be written.
    """
    files = _files_to_write(request)
    folder = request.run_dir / LAUNCH_FOLDER
    _check_free(request.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_submission(folder):
        _check_not_queued(request.run_dir)
        if request.dev is not None:
            _freeze_checkout(request.dev, folder)
        for name, text in files.items():
            write_atomic(folder / name, text)
        for path in folder.glob("failures-*.json"):
            path.unlink()
        write_tally(folder / TALLY_NAME, current_tally(request.run_dir))
        job_ids: list[str] = []
        with cancel_on_error(job_ids):
            _queue(request, folder, job_ids)
            job_id, *others = job_ids
            submission = {
                "schema": SCHEMA,
                "job_id": job_id,
                "other_job_ids": others,
                "site": request.site_name,
                "command": ["post-training", *request.command],
                "working_dir": str(Path.cwd()),
                "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_json(folder / SUBMISSION_NAME, submission)
    return job_id


@contextmanager
def _only_submission(folder: Path) -> Iterator[None]:
    """Two people who submit one folder at once must not queue it twice."""
    lock = hold(folder / ".lock")
    if lock is None:
        raise UsageError("it is being submitted just now", where=str(folder.parent))
    with lock:
        yield


def _queue(request: Request, folder: Path, queued: list[str]) -> None:
    """queued: gets the ids: of the job, then of its workers' array; of a chain, in its order."""
    after = [f"afterok:{job_id}" for job_id in request.after]
    if request.num_workers is not None:
        queued.append(_sbatch(folder / "workers.sh", after))
        # afterany: where a worker failed for good, another may have done its chunk since. The job
        # does what is missing, or fails by itself and says why.
        after = [f"afterany:{queued[0]}"]
    if request.num_chained == 1:
        queued.insert(0, _sbatch(folder / "job.sh", after))
        return
    # The first one must not start before it can know who is behind it.
    queued.append(_sbatch(folder / "job.sh", after, hold=True))
    for _ in range(request.num_chained - 1):
        before = [f"afterany:{queued[-1]}"]
        queued.append(_sbatch(folder / "job.sh", before, known=queued))
    write_atomic(folder / "chain", "".join(f"{job_id}\n" for job_id in queued))
    ask_slurm(["scontrol", "release", queued[0]])


def _sbatch(
    script: Path, after: Sequence[str] = (), *, hold: bool = False, known: Sequence[str] = ()
) -> str:
    """The job's id. known: jobs of the same script that are queued already.

    When sbatch does not answer, the queue says whether Slurm has taken the job all the same.
    Errors: PostTrainingError.
    """
    # One that can never start should not wait forever.
    words = [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    hint = f"is it this site, partition and account? {shlex.quote(str(script))} is the script"
    try:
        answer = run_tool(
            ["sbatch", "--parsable", *words, *(["--hold"] if hold else []), script],
            # In the shell of another job its variables would count before the script's own lines.
            env=slurm_environment(),
            hint=hint,
            timeout_s=_SBATCH_TIMEOUT_S,
        )
    except NoAnswerError as error:
        job_id = _taken_all_the_same(script, known, error)
        tell(f"warning: {error.problem}, and the queue has the job: {job_id}")
        return job_id
    return answer.split(";")[0]  # JOB;CLUSTER where there are several


def _taken_all_the_same(script: Path, known: Sequence[str], error: NoAnswerError) -> str:
    """The id of what Slurm has queued without an answer. Errors: PostTrainingError for nothing."""
    hint = "submit it again: a job that Slurm has taken after all is found in the queue, and named"
    try:
        queue = read_queue()
    except PostTrainingError as silent:
        raise PostTrainingError(f"{error.problem}; {silent.problem}", hint=hint) from None
    for job_id, job in queue.items():
        if job.script == str(script) and job_id not in known:
            return job_id
    raise PostTrainingError(f"{error.problem}, and the queue has no such job", hint=hint)


def print_job_and_log(request: Request, job_id: str) -> None:
    log = request.run_dir / LAUNCH_FOLDER / f"slurm-{job_id}.out"
    tell(f"job {job_id} of {request.run_dir}\nlog: {log}")


def submitted_jobs(run_dir: Path) -> list[str]:
    """The ids of the jobs of the run's last submission: the job, then its workers' array; of a
    chain, in its order."""
    try:
        submission = read_json(run_dir / LAUNCH_FOLDER / SUBMISSION_NAME, SCHEMA)
    except FileNotFoundError:
        return []
    return [submission["job_id"], *submission["other_job_ids"]]


def _check_free(run_dir: Path) -> None:
    """Errors: UsageError when the stage would refuse the folder, as far as is known here."""
    if not run_dir.exists():
        return
    record = earlier_record(run_dir)
    if is_live(run_dir):
        raise UsageError(
            "a run is live in this folder",
            where=str(run_dir),
            hint="wait for it, or choose another run_dir",
        )
    if record is not None and record["status"] == "finished":
        raise UsageError(
            f"this run is finished (run {record['run_id']})",
            where=str(run_dir),
            hint="choose another run_dir to run it again",
        )


def _check_not_queued(run_dir: Path) -> None:
    folder = run_dir / LAUNCH_FOLDER
    if not (folder / "job.sh").exists():
        return
    queue = read_queue()
    known = submitted_jobs(run_dir)
    # A `submit` that was killed between sbatch and its record left jobs that Slurm alone knows of.
    scripts = {str(folder / name) for name in ("job.sh", "workers.sh")}
    others = [job_id for job_id, job in queue.items() if job.script in scripts]
    for job_id in (job_ids := list(dict.fromkeys([*known, *others]))):
        if job_id in queue:
            raise UsageError(
                f"job {job_id} is already in the queue for this folder ({queue[job_id].state})",
                where=str(run_dir),
                hint=f"`scancel {' '.join(job_ids)}` stops it for good",
            )


def _files_to_write(request: Request) -> dict[str, str]:
    """{name in RUN/slurm: text}. Errors: UsageError, ConfigError for what the job could not run."""
    launcher = request.site.launcher
    edf = read_environment(
        request.environment,
        {**os.environ, "PWD": str(Path.cwd())},
        Path.cwd(),
        # Singularity's binds are of the compute nodes; a login node may lack some.
        sources_are_here=launcher.takes_edf,
        in_registry=launcher.kind == "sarus",
    )
    check_site(edf, request.site_name)
    check_is_mounted(request.run_dir, "run folder", edf)
    if edf.workdir == str(Path.cwd()):
        check_is_mounted(Path.cwd(), "working folder", edf)
    folder = request.run_dir / LAUNCH_FOLDER
    extra = []
    if request.dev is not None:
        if not (request.dev / "src/post_training").is_dir():
            raise UsageError("--dev: not a checkout of this project", where=str(request.dev))
        extra = development_mounts(folder)
    files = {"job.sh": "", "config.yaml": resolved_yaml(request.config)}
    if launcher.takes_edf:
        files["environment.toml"] = frozen_edf(edf, extra)
        container = None
    else:
        container = _container(edf, extra)
    job = Job(
        stage=request.stage,
        run_dir=request.run_dir,
        working_dir=Path.cwd(),
        max_failures=request.max_failures,
        container=container,
        name=request.name,
        is_chained=request.num_chained > 1,
        is_vetted=request.is_vetted,
    )
    files["job.sh"] = sbatch_script(job, request.site)
    if request.num_workers is not None:
        workers = replace(job, num_workers=request.num_workers)
        files["workers.sh"] = sbatch_script(workers, request.site)
    _check_no_secret(request, edf, files)
    return files


def _container(edf: Edf, extra: Sequence[str]) -> Container:
    """Errors: UsageError for an image that Singularity does not take."""
    if not edf.image.endswith(".sif"):
        raise UsageError(
            f"Singularity needs a SIF (got {edf.image})",
            where=str(edf.path),
            hint="`post-training image push-sif` makes one; render the EDF for this site then",
        )
    return Container(Path(edf.image), edf.env, (*map(str, edf.mounts), *extra))


def _check_no_secret(request: Request, edf: Edf, files: dict[str, str]) -> None:
    """Errors: ConfigError with a line for each secret in what is about to be written, never its
    value."""
    faults = [f"{edf.path}: {line}" for line in secret_faults(edf.env)]
    texts = {**files, "command line": shlex.join(request.command), "folder": str(request.run_dir)}
    if request.dev is not None:
        texts |= {
            str(path): path.read_text(errors="replace")
            for path in sorted((request.dev / "src").rglob("*.py"))
        }
    faults += [
        f"{name}: holds a secret ({kind})"
        for name, text in texts.items()
        if (kind := find_secret(text)) and not (faults and name in files)
    ]
    if faults:
        raise ConfigError(
            faults, hint="nothing was written: all of it would stay in the run folder"
        )


def _freeze_checkout(checkout: Path, folder: Path) -> None:
    shutil.rmtree(folder / "dev", ignore_errors=True)
    (folder / "dev/src").mkdir(parents=True)
    copy_folder(checkout / "src", folder / "dev/src", without=("__pycache__",))
    write_json(folder / "dev.json", describe_changes(checkout))
