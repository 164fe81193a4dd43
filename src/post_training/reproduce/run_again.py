"""Run a recorded run again: its configuration, seeds, threads, number of processes, environment;
on this machine, or as a job of a site's scheduler.

Its inputs are seen read-only; the new folder is the one place that can be written to.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.config.load import load_config
from post_training.core.errors import PostTrainingError
from post_training.core.files import write_atomic
from post_training.launch.queue import wait_for
from post_training.launch.site import Site
from post_training.launch.submit import Request, say_where, submit
from post_training.records.run_record import CONFIG_NAME, RECORD_NAME, read_record
from post_training.reproduce.environment import (
    HERE,
    StoredImage,
    reproduction_edf,
    site_surroundings,
)
from post_training.reproduce.plan import num_ranks
from post_training.stages.registry import find_stage

_MAX_FAILURES = 3


def run_again(
    record: dict[str, Any],
    run_dir: Path,
    new_dir: Path,
    inputs: Mapping[str, Path],
    image: StoredImage,
    site: tuple[str, Site] | None,
    repository: Path,
) -> None:
    """Run what `record` of `run_dir` says in `new_dir`. inputs: where each input is now. site: its
    name and settings, to run there as a job of as many ranks; None: here. repository: has the
    sites' EDFs.

    Errors: PostTrainingError when it fails.
    """
    new_dir.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(record, new_dir, inputs)
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        edf = Path(temporary) / "reproduce.toml"
        around = HERE if site is None else site_surroundings(record, run_dir, repository)
        takes_sif = site is not None and site[1].launcher.kind == "singularity"
        path = image.sif if takes_sif else image.squashfs
        text = reproduction_edf(record, run_dir, new_dir, inputs, (image, path), around)
        write_atomic(edf, text)
        if site is None:
            _run_here(record, run_dir, new_dir, settings, edf)
            return
        request = _request(record, run_dir, new_dir, settings, edf, site)
        job_id = submit(request)
    say_where(request, job_id)
    wait_for(job_id)
    if not (new_dir / RECORD_NAME).exists() or read_record(new_dir)["status"] != "finished":
        raise PostTrainingError(
            f"job {job_id} did not finish the run",
            where=str(new_dir),
            hint=f"`post-training runs logs {new_dir}` shows why",
        )


def _run_here(
    record: dict[str, Any], run_dir: Path, new_dir: Path, settings: dict[str, Any], edf: Path
) -> None:
    command = [
        sys.executable, "-m", "post_training.cli", "edf", "run", str(edf), "--",
        "entrypoint", record["stage"], str(run_dir / CONFIG_NAME), *_overrides(settings),
    ]  # fmt: skip
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise PostTrainingError(f"the run failed again with exit code {code}", where=str(new_dir))


def _request(
    record: dict[str, Any],
    run_dir: Path,
    new_dir: Path,
    settings: dict[str, Any],
    edf: Path,
    named_site: tuple[str, Site],
) -> Request:
    site_name, site = named_site
    if site.scheduler.num_tasks > 1:
        settings = {**settings, "num_processes": None}  # The launcher starts them.
    stage = find_stage(record["stage"])
    overrides = _overrides(settings)
    config = load_config(stage.load_config_class(), run_dir / CONFIG_NAME, overrides).config
    return Request(
        stage.name,
        config,
        new_dir,
        site_name,
        site,
        str(edf),
        _MAX_FAILURES,
        command=sys.argv[1:],
    )


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    # JSON is YAML: text stays text, whatever it looks like.
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _settings(record: dict[str, Any], new_dir: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What the configuration left open or relative, as it was."""
    return {
        "run_dir": str(new_dir),
        "num_processes": num_ranks(record),
        "num_threads": record["topology"]["num_threads"],
        **_folders(record),
        **_reported_to_nobody(record),
        **{key: str(path) for key, path in inputs.items()},
    }


def _folders(record: dict[str, Any]) -> dict[str, str | None]:
    """The data is prepared anew, not found in a cache; fetched datasets are where they were. Models
    for inference are in the new folder, not where those of the run are."""
    placement = record["placement"]
    anew = ("data.cache_dir", "checkpointing.inference_checkpoint_path")
    folders: dict[str, str | None] = {key: None for key in anew if placement.get(key) is not None}
    if (hub_dir := placement.get("data.hub_dir")) is not None:
        folders["data.hub_dir"] = str(Path(record["working_dir"]) / hub_dir)
    return folders


def _reported_to_nobody(record: dict[str, Any]) -> dict[str, list[str]]:
    """A reproduction is no further run on anybody's dashboard."""
    return {"logging.report_to": []} if record["placement"].get("logging.report_to") else {}
