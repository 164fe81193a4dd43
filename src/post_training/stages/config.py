"""Settings that every stage has."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt, model_validator

from post_training.config.model import Config, Role


class DebugConfig(Config):
    """enabled: the run is a trial: its record says so, and run_dir is below runs/debug unless set.
    override_existing: a trial that is in the run folder is removed first. Nothing else ever is."""

    enabled: bool = False
    override_existing: bool = False

    @model_validator(mode="after")
    def _only_trials(self) -> "DebugConfig":
        if self.override_existing and not self.enabled:
            raise ValueError("override_existing: only with enabled: true")
        return self


class StageConfig(Config):
    """run_dir: the run folder. num_processes: local processes, when no launcher started us.
    num_threads: CPU threads of each process; by default, its share of the machine's cores.

    ranks_count: whether the number of processes changes what comes out, and so is identity.
    continues: whether what was stopped is gone on from, and not begun over. version: of the stage's
    own code; raise it when the same settings and inputs come to other rows or weights. Run folders
    of a pipeline are named by it, and chunks of another version are refused."""

    version: ClassVar[int] = 1
    ranks_count: ClassVar[bool] = True
    continues: ClassVar[bool] = False

    run_dir: Annotated[Path | None, Role.PLACEMENT] = None
    num_processes: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    num_threads: Annotated[PositiveInt | None, Role.TOPOLOGY] = None
    # numpy, which every trainer seeds too, knows 32 bits.
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    debug: Annotated[DebugConfig, Role.PLACEMENT] = DebugConfig()

    def check_ranks(self, world_size: int) -> None:
        """Errors: UsageError when so many processes can't do this."""

    def record_dir(self, run_dir: Path) -> Path:
        """Where this process's record is, of a run in `run_dir`."""
        return run_dir

    @property
    def is_worker(self) -> bool:
        """Whether it does a share of a run whose record is another's."""
        return False
