"""A site: how jobs are asked for there, and how its compute nodes start an image.

    sites/NAME.yaml (may extend another) < the user's own settings < the command line's

A site of the user's own is a folder, ~/.config/post-training/sites/NAME, with site.yaml and
edf.toml (slurm/own_sites.py makes and checks it). It is taken by its name, like the project's.

`scheduler` becomes the #SBATCH lines. `launcher` becomes the words in front of the stage: with
kind edf or sarus, srun has an option that takes an EDF; with kind singularity there is none, and
the EDF's mounts and variables become words of a command line (slurm/singularity.py).

A site's file names nobody's account. ~/.config/post-training/sites.yaml does, for its owner:

    clariden: {account: a-something, partition: debug}
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from post_training.config.load import load_config, write_override
from post_training.config.model import Config
from post_training.core import yaml
from post_training.core.errors import UsageError
from post_training.core.files import user_config
from post_training.images.render import OWN_SITES, own_site_folder

SITES_DIR = Path(__file__).parent / "sites"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")


class Scheduler(Config):
    """What a job asks Slurm for: the #SBATCH lines."""

    partition: str | None = Field(None, description="Partition. By default the cluster's own.")
    account: str | None = Field(
        None, description="Account (project) that is charged. By default the user's own."
    )
    reservation: str | None = Field(None, description="Reservation to run in. By default none.")
    time: str = Field(
        description="Wall time as sbatch takes it: MINUTES, MM:SS, HH:MM:SS or D-HH:MM:SS. It must "
        "be over signal_s and a minute, or the job would be stopped as soon as it starts."
    )
    nodes: PositiveInt = Field(1, description="Nodes of a job.")
    gpus_per_node: NonNegativeInt = Field(0, description="GPUs of a node.")
    tasks_per_node: PositiveInt = Field(
        1,
        description="Tasks (ranks) on a node, each with gpus_per_node / tasks_per_node GPUs. With "
        "1 the entrypoint starts a process for each GPU itself, which works on one node only.",
    )
    cpus_per_task: PositiveInt = Field(description="Cores of each task.")
    signal_s: PositiveInt = Field(
        description="Seconds before the end of the wall time at which the stage gets SIGUSR1. A "
        "step and a checkpoint must fit, and Slurm may send it a minute early."
    )
    requeue: bool = Field(True, description="Whether the job may go back to the queue.")
    watch_s: PositiveInt = Field(
        300,
        description="Seconds between two looks of the job's script whether the stage has ended "
        "without srun's notice.",
    )
    options: tuple[str, ...] = Field((), description="Further words for sbatch.")

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        seconds_of(text)
        return text

    @model_validator(mode="after")
    def _possible(self) -> "Scheduler":
        # Slurm would send the signal at once, and the job would begin again forever.
        if seconds_of(self.time) <= (least := self.signal_s + 60):
            raise ValueError(
                f"time: must be over {least} s, signal_s and a minute (got {self.time})"
            )
        if self.nodes > 1 and self.tasks_per_node < self.gpus_per_node:
            raise ValueError(
                f"tasks_per_node: must be {self.gpus_per_node}, a task per GPU, on more than one "
                f"node (got {self.tasks_per_node})"
            )
        return self

    @property
    def num_tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    def once_a_node(self) -> "Scheduler":
        """For a stage of which one process runs on a node: it has the cores of all its tasks."""
        cores = self.cpus_per_task * self.tasks_per_node
        return self.model_copy(update={"tasks_per_node": 1, "cpus_per_task": cores})

    def for_ranks(self, num_ranks: int, nodes: int | None = None) -> "Scheduler":
        """For a job of so many ranks: a task each, on nodes that are full; or one task that starts
        them, when they are fewer than a node's. nodes: of a job of several ranks, as many.

        Errors: UsageError when the ranks do not fill the nodes.
        """
        per_node = self.tasks_per_node
        if nodes is None or num_ranks == 1:
            nodes = max(1, num_ranks // per_node) if per_node > 1 else 1
        if nodes * per_node == num_ranks:
            return self.model_copy(update={"nodes": nodes})
        if nodes == 1 and (per_node == 1 or num_ranks < per_node):
            # Each rank keeps its cores.
            cores = self.cpus_per_task * (num_ranks if per_node > 1 else 1)
            shape = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": cores}
            return self.model_copy(update=shape)
        raise UsageError(
            f"{num_ranks} ranks do not fill {nodes} nodes of {per_node} tasks",
            hint="choose another site or other --nodes",
        )


class Launcher(Config):
    """How the compute nodes start an image."""

    kind: Literal["edf", "sarus", "singularity"] = Field(
        description="edf: srun has an --environment option that takes an EDF; sarus: srun has an "
        "--edf option, whose EDF names an image in a registry; singularity: the EDF's mounts and "
        "variables become a Singularity command."
    )
    srun: tuple[str, ...] = Field((), description="Further words for srun.")
    srun_task_per_gpu: tuple[str, ...] = Field(
        (),
        description="Further words for srun where a node has a task for each of its GPUs: a list "
        "of cores for each task, for example. With fewer tasks they would bind a task to the cores "
        "of one GPU.",
    )
    vet: tuple[str, ...] = Field(
        (),
        description="Command that `submit --vet` runs in the image, as every task of a job: "
        "[vetnode, diagnose, CONFIG.YAML] where vetnode is installed. It prints `Cordon: NODE` for "
        "a bad node. By default our own check of GPUs, NCCL and the run's file system.",
    )
    modules: tuple[str, ...] | None = Field(
        None,
        description="Environment modules that a job loads on its node, after `module purge`; [] "
        "only purges. By default the modules of the shell that submits stay, and their variables "
        "reach the container.",
    )
    command: Literal["singularity", "apptainer"] = Field(
        "singularity", description="The program of that kind. Only with kind singularity."
    )
    options: tuple[str, ...] = Field(
        (), description="Further words for `singularity exec`. Only with kind singularity."
    )
    gpu_variable: str | None = Field(
        None,
        description="Variable that gets the numbers of a task's GPUs on its node, where a node has "
        "several tasks, so that each sees its own. Only with kind singularity.",
    )

    @model_validator(mode="after")
    def _edf_says_the_rest(self) -> "Launcher":
        for name in ("options", "gpu_variable"):
            if self.takes_edf and getattr(self, name):
                raise ValueError(f"{name}: only with kind singularity; an EDF says it itself")
        if self.takes_edf and self.command != "singularity":
            raise ValueError("command: only with kind singularity; an EDF is run by its engine")
        return self

    @property
    def takes_edf(self) -> bool:
        return self.kind != "singularity"

    @property
    def edf_option(self) -> str:
        """Of srun, where it takes an EDF."""
        return "--edf" if self.kind == "sarus" else "--environment"

    @property
    def variable_prefix(self) -> str:
        """Before the names of variables that are set in a container. Apptainer still reads
        Singularity's, with a warning for each."""
        return f"{self.command.upper()}ENV_"


class Storage(Config):
    """The site's file systems."""

    scratch: str = Field(
        description="The user's folder for work. It may hold ${VARIABLES} of the environment."
    )
    permanent: str | None = Field(
        None,
        description="The user's folder for what must last. It may hold ${VARIABLES} of the "
        "environment.",
    )
    shared: str | None = Field(
        None,
        description="The one folder on scratch that a group shares, often one person's. It may "
        "hold ${VARIABLES}. By default each user has a post-training-shared of their own.",
    )
    deleted_after_days: PositiveInt | None = Field(
        None,
        description="Days without use after which the site deletes a file on scratch. By default "
        "it deletes none.",
    )


class Site(Config):
    """A site's file."""

    scheduler: Scheduler = Field(description="What a job asks Slurm for.")
    launcher: Launcher = Field(description="How the compute nodes start an image.")
    cache_dir: Path = Field(
        description="Folder of each node for compiled kernels; never on a shared file system."
    )
    storage: Storage = Field(description="The site's file systems.")

    def for_stage(self, *, is_one_a_node: bool) -> "Site":
        """With as many tasks as the stage has processes on a node."""
        scheduler = self.scheduler.once_a_node() if is_one_a_node else self.scheduler
        return self.model_copy(update={"scheduler": scheduler})


def load_site(name: str, changes: Mapping[str, str | int | None], folder: Path = SITES_DIR) -> Site:
    """The site's file, with `changes` to its scheduler over the user's own settings; None leaves
    what is below.

    Errors: UsageError for an unknown site, ConfigError for a setting that is wrong.
    """
    path = find_site(name, folder)
    asked = {key: value for key, value in changes.items() if value is not None}
    overrides = [
        write_override(f"scheduler.{key}", value)
        for key, value in {**own_settings(name), **asked}.items()
    ]
    return load_config(Site, path, overrides)


def find_site(name: str, folder: Path = SITES_DIR) -> Path:
    """The file of a site, the project's or the user's own.

    Errors: UsageError for an unknown name, and for one that both have: a run's record names its
    site, and it must be clear which was meant.
    """
    names = site_names(folder)
    if name not in names:
        raise UsageError(
            f"no site {name!r}",
            hint=f"there are: {', '.join(names)}; `post-training site new` makes one of your own",
        )
    path, own = folder / f"{name}.yaml", own_site_folder(name) / "site.yaml"
    if path.is_file() and own.is_file():
        raise UsageError(
            f"two sites are called {name!r}: the project's and your own",
            where=str(own.parent),
            hint="rename your folder, and POST_TRAINING_SITE in its edf.toml",
        )
    return own if own.is_file() else path


def site_names(folder: Path = SITES_DIR) -> list[str]:
    """Every site's name, the user's own too."""
    own = (user_config() / OWN_SITES).glob("*/site.yaml")
    return sorted(
        {path.stem for path in folder.glob("*.yaml")} | {path.parent.name for path in own}
    )


def own_settings(name: str) -> dict[str, Any]:
    """What the user's sites.yaml says of a site's scheduler. Errors: UsageError, ConfigError."""
    path = user_config() / "sites.yaml"
    if not path.exists():
        return {}
    sites = yaml.load(path.read_bytes(), str(path)).data or {}
    settings = sites.get(name) or {} if isinstance(sites, dict) else None
    if not isinstance(settings, dict):
        raise UsageError(
            "must be SITE: {setting: value, …}", where=str(path), hint="account, partition, time …"
        )
    return settings


def seconds_of(time: str) -> int:
    """Slurm's `90` (minutes), `30:00`, `12:00:00`, `1-12`, `1-12:00:00`. Errors: ValueError."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"must be MINUTES, MM:SS, HH:MM:SS or D-HH:MM:SS (got {time!r})")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) < 3:
        minutes, seconds = [*numbers, 0][:2]
        return minutes * 60 + seconds
    hours, minutes, seconds = numbers
    return (hours * 60 + minutes) * 60 + seconds
