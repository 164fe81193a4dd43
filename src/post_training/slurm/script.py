"""The batch script of a stage: a head of #SBATCH lines and quoted values, then job.sh as it is.

The stage runs as one Slurm step. When it fails, a second, small step inside the same image
(slurm/outcome.py) says whether the same job may try again; the script then hands itself back to
Slurm with `scontrol requeue`. While the stage runs, the script asks every few minutes whether a
process still works in the run folder.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.records.run import LAUNCH_FOLDER
from post_training.slurm.singularity import script_exports, singularity_words
from post_training.slurm.site import Site

_IMAGE_DIR = "/opt/post-training"
_BODY = Path(__file__).with_name("job.sh")
_VET = Path(__file__).with_name("vet.sh")
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "MIOPEN_USER_DB_PATH": "miopen",
    "MIOPEN_CUSTOM_CACHE_DIR": "miopen",
}


@dataclass(frozen=True)
class Container:
    """What the EDF says, for Singularity, which reads none.

    mounts: SRC:DST[:FLAGS].
    env: values as they are; an empty one unsets its variable.
    """

    image: Path
    env: dict[str, str]
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A stage to be run. All paths are absolute.

    max_failures: how many failures without progress in between may be tried again.
    container: on a site without EDFs.
    name: what the queue shows; None: the stage's and the run folder's.
    num_workers: the job is an array of so many tasks, which share the run's chunks.
    is_chained: further jobs of the run wait behind it, and none is requeued.
    is_vetted: its nodes are looked at before the stage starts.
    """

    stage: str
    run_dir: Path
    working_dir: Path
    max_failures: int
    container: Container | None = None
    name: str | None = None
    num_workers: int | None = None
    is_chained: bool = False
    is_vetted: bool = False

    @property
    def folder(self) -> Path:
        """It holds what the job reads: config.yaml and environment.toml."""
        return self.run_dir / LAUNCH_FOLDER


def sbatch_script(job: Job, site: Site) -> str:
    """The whole script. Errors: UsageError for a path that Slurm cannot take."""
    for path in (job.run_dir, job.working_dir):
        if any(character in str(path) for character in "\n\r\\"):
            raise UsageError("a path with a line break or \\ in it: Slurm cannot take it",
                             where=repr(str(path)))  # fmt: skip
    scheduler = site.scheduler
    shape = [
        f"--nodes={scheduler.nodes}",
        f"--ntasks-per-node={scheduler.tasks_per_node}",
        # Since 22.05 srun does not take this one over from sbatch.
        f"--cpus-per-task={scheduler.cpus_per_task}",
    ]
    stage = [
        *_srun(job, site),
        *shape,
        # When one task ends, the others get a minute to say what they have to say, and are then
        # ended: none waits forever for a dead one, and none is cut off in the middle of its error.
        "--wait=60",
        "--kill-on-bad-exit=0",
        *site.launcher.srun,
        *(site.launcher.srun_task_per_gpu if _has_task_per_gpu(site) else ()),
        *_inside(job, site, each_its_gpu=True),
        *(["entrypoint"] if site.launcher.takes_edf else [f"{_IMAGE_DIR}/bin/entrypoint"]),
        job.stage,
        str(job.folder / "config.yaml"),
        # Requeued by Slurm just after its end, it has nothing left to do.
        "--skip-finished",
    ]
    verdict = [
        *_srun(job, site),
        *("--nodes=1", "--ntasks=1", "--overlap", "--time=5"),
        *_inside(job, site),
        # -I: neither the working folder nor PYTHONPATH has a say in it.
        *(f"{_IMAGE_DIR}/venv/bin/python", "-I", "-m", "post_training.slurm.outcome"),
        *(str(job.run_dir), str(job.max_failures)),
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {job.stage}, written by `post-training submit`. A requeued job runs this again.",
            "# shellcheck disable=SC2016,SC2054  # every quoted word below stands for itself",
            *_directives(job, site),
            *_modules(site),
            *_exports(job, site),
            "",
            f"run_dir={shlex.quote(str(job.run_dir))}",
            f"num_workers={job.num_workers or ''}",
            f"is_chained={_yes(job.is_chained)}",
            f"may_requeue={_yes(_may_requeue(job, site))}",
            f"watch_s={site.scheduler.watch_s}",
            *_array("stage", stage),
            *_array("verdict", verdict),
            "",
            *(_vetting(job, site, shape) if job.is_vetted else ()),
            _BODY.read_text(),
        ]
    )


def _vetting(job: Job, site: Site, shape: Sequence[str]) -> list[str]:
    """vet.sh, and the step that it calls: the site's own program, or ours in the image."""
    python = f"{_IMAGE_DIR}/venv/bin/python"
    own = (python, "-I", "-m", "post_training.stages.vet", str(job.run_dir))
    words = [
        *_srun(job, site),
        *shape,
        *("--wait=60", "--kill-on-bad-exit=0", "--time=3"),
        *site.launcher.srun,
        *_inside(job, site, each_its_gpu=True),
        *(site.launcher.vet or own),
    ]
    lines = [*_array("vetting", words), f"max_vettings={job.max_failures}", ""]
    return [*lines, _VET.read_text()]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _has_task_per_gpu(site: Site) -> bool:
    return site.scheduler.tasks_per_node == site.scheduler.gpus_per_node


def _may_requeue(job: Job, site: Site) -> bool:
    # Of a chain the next job goes on; a requeued one would run beside it.
    return site.scheduler.requeue and not job.is_chained


def _directives(job: Job, site: Site) -> list[str]:
    scheduler = site.scheduler
    log = f"{job.folder}/slurm-".replace("%", "%%")
    options = {
        "job-name": job.name or f"{job.stage}-{job.run_dir.name}",
        "array": f"0-{job.num_workers - 1}" if job.num_workers else None,
        "partition": scheduler.partition,
        "account": scheduler.account,
        "reservation": scheduler.reservation,
        "time": scheduler.time,
        "nodes": scheduler.nodes,
        "ntasks-per-node": scheduler.tasks_per_node,
        "cpus-per-task": scheduler.cpus_per_task,
        "gpus-per-node": scheduler.gpus_per_node or None,
        "chdir": job.working_dir,
        "output": log + ("%A_%a.out" if job.num_workers else "%j.out"),
        "open-mode": "append",
        # To the tasks of the steps. `B:` would reach this shell alone.
        "signal": f"USR1@{scheduler.signal_s}",
    }
    words = [
        f"--{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    words += ["--requeue" if _may_requeue(job, site) else "--no-requeue", *scheduler.options]
    return [f"#SBATCH {word}" for word in words]


def _modules(site: Site) -> list[str]:
    modules = site.launcher.modules
    if modules is None:
        return []
    loads = [f"module load {shlex.join(modules)} || exit 2"] if modules else []
    return [
        "",
        "# Before all else: the variables of the modules of whoever submitted would go inside.",
        "# `module` is a function, which a job has only if the shell before it exported it.",
        "# shellcheck source=/dev/null",
        "type module >/dev/null 2>&1 || source /etc/profile",
        "module purge",
        *loads,
    ]


def _exports(job: Job, site: Site) -> list[str]:
    """Variables that reach the tasks through srun, into the container."""
    lines = ["", f"cache={shlex.quote(str(site.cache_dir))}/post-training-$SLURM_JOB_ID"]
    lines += [f'export {name}="$cache/{folder}"' for name, folder in CACHES.items()]
    if job.container is not None:
        lines += ["", *script_exports(site.launcher, job.container.env)]
    return lines


def _srun(job: Job, site: Site) -> list[str]:
    if site.launcher.takes_edf:
        return ["srun", f"{site.launcher.edf_option}={job.folder / 'environment.toml'}"]
    return ["srun"]


def _inside(job: Job, site: Site, *, each_its_gpu: bool = False) -> list[str]:
    """Words between srun's options and the command in the image."""
    if job.container is None:
        return []
    container = job.container
    words = singularity_words(
        site.launcher,
        container.mounts,
        str(job.working_dir),
        str(container.image),
        container.env,
    )
    # A task that is alone on its node sees all devices.
    if each_its_gpu and site.launcher.gpu_variable and site.scheduler.tasks_per_node > 1:
        words = ["bash", "-c", f'{_select_devices(site)} exec "$@"', "task", *words]
    return words


def _select_devices(site: Site) -> str:
    """The assignment in front of a command that shows a task its devices. Which task it is, is
    known in the task only."""
    scheduler = site.scheduler
    count = max(1, scheduler.gpus_per_node // scheduler.tasks_per_node)
    if count == 1:
        return f"{site.launcher.gpu_variable}=$SLURM_LOCALID"
    first, last = f"SLURM_LOCALID * {count}", f"SLURM_LOCALID * {count} + {count - 1}"
    return f"{site.launcher.gpu_variable}=$(seq -s , $(({first})) $(({last})))"


def _array(name: str, words: Sequence[str]) -> list[str]:
    return [f"{name}=(", *(f"    {shlex.quote(word)}" for word in words), ")"]
