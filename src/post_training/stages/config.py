"""Settings that every stage has."""

from pathlib import Path
from typing import Annotated

from pydantic import PositiveInt

from post_training.config.model import Config, Role


class StageConfig(Config):
    """run_dir: the run folder. num_processes: local processes, when no launcher started us.
    num_threads: CPU threads of each process; by default, its share of the machine's cores."""

    run_dir: Annotated[Path | None, Role.PLACEMENT] = None
    num_processes: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    num_threads: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    seed: int = 0
