"""Submit a stage: everything the job reads is written into RUN/slurm first, and then it is queued.

RUN/slurm/config.yaml        the whole configuration, defaults and overrides in it
          environment.toml   the EDF with the image's digest, its parents in it
          job.sh             what Slurm got
          dev/ dev.json      with --dev: the sources, and their commit and diff
          submission.json    the job's id and who asked for it, with what
          slurm-ID.out       what the job prints, all attempts one after another
          failures.json      failures since the last progress (launch/outcome.py)
"""

import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_training.config.load import resolved_yaml
from post_training.config.model import Config
from post_training.core.errors import UsageError
from post_training.core.files import read_json, write_atomic, write_json
from post_training.core.process import run_tool
from post_training.images.checkout import describe_changes
from post_training.images.edf import Edf
from post_training.launch.environment import (
    check_is_mounted,
    check_site,
    development_mounts,
    frozen_edf,
    pins,
    read_environment,
)
from post_training.launch.outcome import current_tally, write_tally
from post_training.launch.script import Container, Job, sbatch_script
from post_training.launch.site import Site
from post_training.records.run_record import LAUNCH_FOLDER, earlier_record, is_live

SCHEMA = "post-training/submission/1"
_SUBMISSION = "submission.json"


@dataclass(frozen=True)
class Request:
    """What was asked for. config: resolved, with an absolute run_dir. command: as it was typed."""

    stage: str
    config: Config
    run_dir: Path
    site_name: str
    site: Site
    environment: str
    max_failures: int
    dev: Path | None = None
    command: Sequence[str] = ()


def submit(request: Request) -> str:
    """Freeze and queue; the job's id. Errors: UsageError when the run folder is taken."""
    files = _plan(request)
    folder = request.run_dir / LAUNCH_FOLDER
    _check_free(request.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_submission(folder):
        _check_not_queued(folder)
        if request.dev is not None:
            _freeze_checkout(request.dev, folder)
        for name, text in files.items():
            write_atomic(folder / name, text)
        write_tally(folder / "failures.json", current_tally(request.run_dir))
        job_id = _sbatch(folder / "job.sh")
        submission = {
            "schema": SCHEMA,
            "job_id": job_id,
            "site": request.site_name,
            "command": ["post-training", *request.command],
            "working_dir": str(Path.cwd()),
            "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / _SUBMISSION, submission)
    return job_id


def preview(request: Request) -> str:
    """The files that `submit` would write, as a text; nothing is written or queued."""
    files = _plan(request)
    _check_free(request.run_dir)
    folder = request.run_dir / LAUNCH_FOLDER
    return "\n".join(f"# ---- {folder / name}\n{text}" for name, text in files.items())


def _plan(request: Request) -> dict[str, str]:
    edf = read_environment(request.environment, {**os.environ, "PWD": str(Path.cwd())}, Path.cwd())
    folder = request.run_dir / LAUNCH_FOLDER
    extra = []
    if request.dev is not None:
        if not (request.dev / "src/post_training").is_dir():
            raise UsageError("--dev: not a checkout of this project", where=str(request.dev))
        extra = development_mounts(folder)
    files = {"job.sh": "", "config.yaml": resolved_yaml(request.config)}
    if request.site.launcher.kind == "edf":
        check_site(edf, request.site_name)
        check_is_mounted(request.run_dir, "run folder", edf)
        if edf.workdir == str(Path.cwd()):
            check_is_mounted(Path.cwd(), "working folder", edf)
        files["environment.toml"] = frozen_edf(edf, extra)
        container = None
    else:
        container = _container(edf, extra)
    job = Job(request.stage, request.run_dir, Path.cwd(), request.max_failures, container)
    files["job.sh"] = sbatch_script(job, request.site)
    return files


def _container(edf: Edf, binds: Sequence[str]) -> Container:
    """Singularity gets the image and its pins from the EDF, and all the rest from the site."""
    return Container(Path(edf.image), pins(edf), tuple(binds))


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


def _check_not_queued(folder: Path) -> None:
    try:
        job_id = read_json(folder / _SUBMISSION, SCHEMA)["job_id"]
    except FileNotFoundError:
        return
    # All jobs are asked for: for one that is long gone squeue fails, as it does when Slurm is down.
    queued = dict(
        line.split() for line in run_tool(["squeue", "--noheader", "--format=%A %T"]).splitlines()
    )
    if job_id in queued:
        raise UsageError(
            f"job {job_id} is already in the queue for this folder ({queued[job_id].lower()})",
            where=str(folder.parent),
            hint=f"`scancel {job_id}` stops it for good",
        )


@contextmanager
def _only_submission(folder: Path) -> Iterator[None]:
    """Two people who submit one folder at once must not queue it twice."""
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError("it is being submitted just now", where=str(folder.parent)) from None
        yield


def _freeze_checkout(checkout: Path, folder: Path) -> None:
    shutil.rmtree(folder / "dev", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(checkout / "src", folder / "dev/src", ignore=ignored)
    write_json(folder / "dev.json", describe_changes(checkout))


def _sbatch(script: Path) -> str:
    # In the shell of another job its variables would count before the script's own lines.
    env: dict[str, Any] = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))
    }
    answer = run_tool(
        ["sbatch", "--parsable", script],
        env=env,
        hint=f"is it this site, partition and account? {shlex.quote(str(script))} is the script",
    )
    return answer.split(";")[0]  # JOB;CLUSTER where there are several


def say_where(request: Request, job_id: str) -> None:
    log = request.run_dir / LAUNCH_FOLDER / f"slurm-{job_id}.out"
    print(f"job {job_id} of {request.run_dir}\nlog: {log}", file=sys.stderr)
