"""A site: how jobs are asked for there, and how its compute nodes start an image.

    sites/NAME.yaml (may extend another) < the user's own settings < the command line's

`scheduler` becomes the #SBATCH lines. `launcher` becomes the words in front of the stage: with
kind edf, srun has an --environment option; with kind singularity there is none, and the EDF's
mounts and variables become words of a command line (slurm/singularity.py).

A site's file names nobody's account. ~/.config/post-training/sites.yaml does, for its owner:

    clariden: {account: a-something, partition: debug}
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from post_training.config.load import load_config
from post_training.config.model import Config
from post_training.core import yaml
from post_training.core.errors import UsageError

SITES_DIR = Path(__file__).parent / "sites"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")


class Scheduler(Config):
    """time: the wall time, as sbatch takes it. signal_s: how long before its end the stage gets
    SIGUSR1: a step and a checkpoint must fit, and Slurm may send it a minute early.
    tasks_per_node: ranks, of which each has gpus_per_node / tasks_per_node GPUs; with one, the
    entrypoint starts a process per GPU itself, which works on one node only.
    requeue: whether the job may go back to the queue. watch_s: how often the job's script looks
    whether the stage has ended without srun's notice. options: further words for sbatch."""

    partition: str | None = None
    account: str | None = None
    reservation: str | None = None
    time: str
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    tasks_per_node: PositiveInt = 1
    cpus_per_task: PositiveInt
    signal_s: PositiveInt
    requeue: bool = True
    watch_s: PositiveInt = 300
    options: tuple[str, ...] = ()

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
            return self.model_copy(update={"nodes": 1, "tasks_per_node": 1})
        raise UsageError(
            f"{num_ranks} ranks do not fill {nodes} nodes of {per_node} tasks",
            hint="choose another site or other --nodes",
        )


class Launcher(Config):
    """srun: further words for srun. The rest is of Singularity alone. options: for `singularity
    exec`. gpu_variable: gets the task's number on its node, so that each task sees one GPU."""

    kind: Literal["edf", "singularity"]
    srun: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    gpu_variable: str | None = None

    @model_validator(mode="after")
    def _edf_says_the_rest(self) -> "Launcher":
        for name in ("options", "gpu_variable"):
            if self.kind == "edf" and getattr(self, name):
                raise ValueError(f"{name}: only with kind singularity; an EDF says it itself")
        return self


class Storage(Config):
    """scratch: for work. permanent: for what must last. Both may hold `${VARIABLES}`, since they
    are the user's own. deleted_after_days: without use, on scratch; None where nothing is."""

    scratch: str
    permanent: str | None = None
    deleted_after_days: PositiveInt | None = None


class Site(Config):
    """cache_dir: a folder on each node, for compiled kernels; never a shared file system."""

    scheduler: Scheduler
    launcher: Launcher
    cache_dir: Path
    storage: Storage


def load_site(name: str, changes: Mapping[str, str | int | None], folder: Path = SITES_DIR) -> Site:
    """The site's file, with `changes` to its scheduler over the user's own settings; None leaves
    what is below.

    Errors: UsageError for an unknown site, ConfigError for a setting that is wrong.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UsageError(f"no site {name!r}", hint=f"there are: {known}")
    asked = {key: value for key, value in changes.items() if value is not None}
    # JSON is YAML: a time like 90 stays text.
    overrides = [
        f"scheduler.{key}={json.dumps(value)}"
        for key, value in {**own_settings(name), **asked}.items()
    ]
    return load_config(Site, path, overrides).config


def own_settings(name: str) -> dict[str, Any]:
    """What the user's sites.yaml says of a site's scheduler. Errors: UsageError, ConfigError."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = Path(folder) / "post-training/sites.yaml"
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
