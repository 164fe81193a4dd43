"""`post-training submit STAGE cfg.yaml …`: the stage's configuration meets the site's scheduler."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from post_training.config.load import load_config
from post_training.core.errors import UsageError
from post_training.launch.site import load_site
from post_training.launch.submit import Request, preview, say_where, submit
from post_training.stages.config import StageConfig
from post_training.stages.registry import find_stage


def submit_stage(
    stage_name: str,
    config_path: Path,
    overrides: Sequence[str],
    site: tuple[str, Mapping[str, str | int | None]],
    environment: str,
    *,
    max_failures: int,
    dev: Path | None,
    num_chained: int,
    dry_run: bool,
) -> None:
    """Print the job's id; with dry_run, the files that it would read. site: its name, and what of
    its scheduler is to be otherwise."""
    site_name, changes = site
    stage = find_stage(stage_name)
    config = load_config(stage.load_config_class(), config_path, overrides).config
    loaded = load_site(site_name, changes)
    run_dir = _run_dir(config, config_path)
    if num_chained > 1 and not config.continues:
        raise UsageError(
            f"--chain: {stage.name} begins over each time it is stopped",
            hint="give it the --time that it needs",
        )
    if loaded.scheduler.num_tasks > 1:
        config.check_ranks(loaded.scheduler.num_tasks)
    request = Request(
        stage.name,
        config.model_copy(update={"run_dir": run_dir}),
        run_dir,
        site_name,
        loaded,
        environment,
        max_failures,
        dev and dev.absolute(),
        sys.argv[1:],
        num_chained=num_chained,
    )
    if dry_run:
        print(preview(request), end="")
        return
    job_id = submit(request)
    say_where(request, job_id)
    print(job_id)


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
