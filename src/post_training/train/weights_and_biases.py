"""Weights & Biases: a run there for a run here, of the same id, however often it is resumed.

    WANDB_API_KEY_FILE or WANDB_API_KEY     online; else offline, which uses no network
    WANDB_MODE, WANDB_ENTITY, WANDB_BASE_URL   as W&B documents them

Where W&B can't be reached the run is kept offline, and a line says how it gets there later.
Offline, each attempt writes a new folder with all lines and removes the one before. Online, W&B
has the lines of the attempts before; those get no second place.

W&B's work is done by a process of its own. In ours it neither replaces stdout nor looks at the
code, the git repository or the command line: run.json has what there is to know.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.train.reporters import Line, scalars
from post_training.train.training_config import LoggingConfig

_START_TIMEOUT_S = 30.0
_UPLOAD_TIMEOUT_S = 120.0
KEY, KEY_FILE, MODE = "WANDB_API_KEY", "WANDB_API_KEY_FILE", "WANDB_MODE"


class WeightsAndBiases:
    """run_id: of the record. settings: shown as the run's config. warn: gets one line when a run
    that should be online isn't."""

    name = "W&B"

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        run_id: str,
        settings: dict[str, Any],
        warn: Callable[[str], None],
    ):
        self._config = config
        self._run_dir = run_dir
        self._run_id = run_id
        self._settings = settings
        self._warn = warn
        self._run: Any = None

    def start(self, lines: Sequence[Line]) -> None:
        self._prepare_environment()
        import wandb

        key = _api_key()
        mode = os.environ.get(MODE) or ("online" if key else "offline")
        try:
            self._run = self._start(mode, key)
        except wandb.Error as error:
            if mode != "online":
                raise
            wandb.teardown()  # its process holds on to the id
            self._run = self._start("offline", None)
            self._warn(
                f"warning: W&B is not reached ({str(error).splitlines()[0]}); the run is kept "
                f"offline, for `wandb sync {self._folder}`"
            )
        for line in lines:
            self.write(line)
        if mode != "disabled":  # by WANDB_MODE: it keeps nothing
            self._remove_earlier()

    def write(self, line: Line) -> None:
        if line["step"] >= self._run.starting_step:
            self._run.log(scalars(line), step=line["step"])

    def describe(self, facts: dict[str, Any], figures: dict[str, float]) -> None:
        """What is known once a run has ended: among its config, and its summary."""
        # A verdict comes later, and changes what an earlier call said.
        self._run.config.update({"post_training": facts}, allow_val_change=True)
        self._run.summary.update(figures)

    @property
    def place(self) -> str:
        """Where it can be seen; or what sends it there, where it is offline."""
        return self._run.url or f"offline, for `wandb sync {self._folder}`"

    def close(self, *, failed: bool) -> None:
        import wandb

        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            raise TimeoutError(
                f"not all was uploaded within {_UPLOAD_TIMEOUT_S:.0f} s; "
                f"the rest is for `wandb sync {self._folder}`"
            ) from None
        finally:
            wandb.teardown()  # waits for what is still on its way to the disk

    @property
    def _folder(self) -> Path:
        return Path(self._run.settings.sync_dir)

    def _prepare_environment(self) -> None:
        """Read by W&B when it is imported, and by its process."""
        if (chosen := self._config.wandb_dir) is not None:
            # Of a folder that is not there W&B makes one in /tmp, where it is lost.
            chosen.mkdir(parents=True, exist_ok=True)
        own = self._run_dir / "wandb"
        own.mkdir(exist_ok=True)
        for name in ("CACHE", "CONFIG", "DATA"):
            os.environ[f"WANDB_{name}_DIR"] = str(own / name.lower())
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # to W&B's makers, of its own errors

    def _start(self, mode: str, key: str | None) -> Any:
        import wandb

        return wandb.init(
            entity=self._config.wandb_entity,
            project=self._config.wandb_project,
            name=self._config.wandb_run_name or self._run_dir.name,
            group=self._config.wandb_group,
            tags=self._config.wandb_tags,
            config=self._settings,
            id=self._run_id,
            resume="allow",
            reinit="create_new",
            dir=str(self._config.wandb_dir or self._run_dir),
            mode=mode,
            settings=wandb.Settings(
                api_key=key,
                init_timeout=_START_TIMEOUT_S,
                finish_timeout=_UPLOAD_TIMEOUT_S,
                finish_timeout_raises=True,
                console="off",
                symlink=False,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )

    def _remove_earlier(self) -> None:
        for folder in self._folder.parent.glob(f"offline-run-*-{self._run_id}"):
            if folder.name != self._folder.name:
                shutil.rmtree(folder)


def _api_key() -> str | None:
    """Errors: UsageError when the file that is named can't be read."""
    if (path := os.environ.get(KEY_FILE)) is None:
        return os.environ.get(KEY)
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise UsageError(
            f"{(error.strerror or str(error)).lower()} ({KEY_FILE})", where=path
        ) from None
