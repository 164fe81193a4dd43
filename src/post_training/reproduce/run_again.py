"""Run a recorded run again: its configuration, seeds, threads, number of processes, environment;
on this machine, or as a job of a site's scheduler.

Its inputs are seen read-only; the new folder is the one place that can be written to.

A record says which variables were set and, where our runner made them, which mounts. Another
engine keeps its mounts to itself, and no record has annotations (Alps chooses the network plugin
by them): for a job of a site these come from the run's frozen EDF, or else from the site's own.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.config.load import load_config, write_override
from post_training.core.errors import PostTrainingError
from post_training.core.files import write_atomic
from post_training.images.edf import escape, expand, merge_edf, parse_mount
from post_training.images.identity import LAYER_FOLDERS
from post_training.images.layer import layer_mounts
from post_training.images.render import edf_text, image_environment, site_file
from post_training.records.machine import portable_environment, recorded_environment
from post_training.records.run import LAUNCH_FOLDER
from post_training.records.run_record import CONFIG_NAME, RECORD_NAME, read_record
from post_training.reproduce.plan import Plan, StoredImage, num_ranks
from post_training.slurm.environment import image_of
from post_training.slurm.queue import wait_for
from post_training.slurm.submit import Request, print_job_and_log, submit
from post_training.stages.registry import find_stage

_MAX_FAILURES = 3
_PINS = "POST_TRAINING_IMAGE_"


def run_again(
    plan: Plan, new_dir: Path, inputs: Mapping[str, Path], image: StoredImage, repository: Path
) -> None:
    """Run the plan's run in `new_dir`: here, or at its site as a job of as many ranks.

    inputs: where each input is now.
    repository: has the sites' EDFs.
    Errors: PostTrainingError when it fails.
    """
    record, run_dir, site = plan.record, plan.run_dir, plan.site
    new_dir.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(record, new_dir, inputs)
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        edf = Path(temporary) / "reproduce.toml"
        around = HERE if site is None else read_surroundings(record, run_dir, repository)
        path: Path | str = image.squashfs
        if site is not None:
            path = image_of(image.record, image.store, site[1].launcher)
        text = reproduction_edf(record, run_dir, new_dir, inputs, (image, path), around)
        write_atomic(edf, text)
        if site is None:
            _run_here(plan, new_dir, settings, edf)
            return
        request = _request(plan, new_dir, settings, edf)
        job_id = submit(request)
    print_job_and_log(request, job_id)
    wait_for(job_id)
    if not (new_dir / RECORD_NAME).exists() or read_record(new_dir)["status"] != "finished":
        raise PostTrainingError(
            f"job {job_id} did not finish the run",
            where=str(new_dir),
            hint=f"`post-training runs logs {new_dir}` shows why",
        )


def _run_here(plan: Plan, new_dir: Path, settings: dict[str, Any], edf: Path) -> None:
    command = [
        sys.executable, "-m", "post_training.cli", "edf", "run", str(edf), "--",
        "entrypoint", plan.record["stage"], str(plan.run_dir / CONFIG_NAME), *_overrides(settings),
    ]  # fmt: skip
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise PostTrainingError(f"the run failed again with exit code {code}", where=str(new_dir))


def _request(plan: Plan, new_dir: Path, settings: dict[str, Any], edf: Path) -> Request:
    assert plan.site is not None
    site_name, site = plan.site
    if site.scheduler.num_tasks > 1:
        settings = {**settings, "num_processes": None}  # The launcher starts them.
    stage = find_stage(plan.record["stage"])
    overrides = _overrides(settings)
    config = load_config(stage.load_config_class(), plan.run_dir / CONFIG_NAME, overrides)
    return Request(
        stage=stage.name,
        config=config,
        run_dir=new_dir,
        site_name=site_name,
        site=site,
        environment=str(edf),
        max_failures=_MAX_FAILURES,
        command=sys.argv[1:],
    )


@dataclass(frozen=True)
class Surroundings:
    """What an EDF has that a record may lack: mounts as SRC:DST[:FLAGS], variables, annotations."""

    mounts: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


HERE = Surroundings()


def read_surroundings(record: Mapping[str, Any], run_dir: Path, repository: Path) -> Surroundings:
    """What a job of the site that the run was at has. Errors: UsageError, ConfigError."""
    frozen = run_dir / LAUNCH_FOLDER / "environment.toml"
    site = record["environment"].get("POST_TRAINING_SITE")
    if frozen.exists():
        path = frozen
    elif site is not None:
        path = site_file(site, repository)
    else:
        return HERE
    merged = merge_edf(path, os.environ, Path.cwd())
    env = merged.get("env", {})
    # What a record names, it names as it was, absent or not.
    told = recorded_environment(env)
    return Surroundings(
        [expand(text, os.environ) for text in merged.get("mounts", [])],
        {
            name: value
            for name, value in env.items()
            if name not in told and not name.startswith(_PINS)
        },
        merged.get("annotations", {}),
    )


def reproduction_edf(
    record: Mapping[str, Any],
    run_dir: Path,
    new_dir: Path,
    inputs: Mapping[str, Path],
    image: tuple[StoredImage, Path | str],
    around: Surroundings,
) -> str:
    """The EDF of a reproduction: the recorded image, environment and mounts, for one new run. All
    that the run saw is read-only, and the new folder's place on top of it is writable.

    inputs: where each input is now. image: with what of it is to be run.
    """
    stored, path = image
    mounts = [f"{folder}:{folder}:ro" for folder in (stored.store.folder, run_dir)]
    for text in [*around.mounts, *record["mounts"]]:
        mount = parse_mount(text, Path("/"))
        if str(mount.target) in LAYER_FOLDERS:
            continue  # The image's own, below.
        if mount.source.exists():
            mounts.append(f"{mount.source}:{mount.target}:ro")
    for named in inputs.values():
        mounted = named if named.exists() else named.parent  # a prefix of indexed datasets
        mounts.append(f"{mounted}:{mounted}:ro")
    mounts.append(f"{new_dir.parent}:{new_dir.parent}")
    # Values were expanded when they were recorded.
    environment = {
        name: escape(value) for name, value in portable_environment(record["environment"]).items()
    }
    digest = stored.record["sqsh_sha256"]
    pins = image_environment(stored.record, path, stored.store.record_path(digest))
    return edf_text(
        {
            "image": str(path),
            "workdir": str(new_dir.parent),
            "entrypoint": False,
            "writable": False,
            "mounts": [
                *dict.fromkeys(mounts),
                *layer_mounts(stored.record, stored.store),
            ],
        },
        {"env": {**around.env, **environment, **pins}, "annotations": around.annotations},
    )


def _settings(record: dict[str, Any], new_dir: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What the configuration left open or relative, as it was."""
    return {
        "run_dir": str(new_dir),
        "num_processes": num_ranks(record),
        "num_threads": record["topology"]["num_threads"],
        **_folders(record),
        **_without_what_is_of_one_run(record),
        **_without_hub_names(record, inputs),
        **{key: str(path) for key, path in inputs.items()},
    }


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [write_override(key, value) for key, value in settings.items()]


def _folders(record: dict[str, Any]) -> dict[str, str | None]:
    """The data is prepared anew, not found in a cache; fetched datasets are where they were. Models
    for inference are in the new folder, not where those of the run are."""
    placement = record["placement"]
    anew = ("data.cache_dir", "checkpointing.inference_checkpoint_path")
    folders: dict[str, str | None] = {key: None for key in anew if placement.get(key) is not None}
    if (hub_dir := placement.get("data.hub_dir")) is not None:
        folders["data.hub_dir"] = str(Path(record["working_dir"]) / hub_dir)
    return folders


def _without_what_is_of_one_run(record: dict[str, Any]) -> dict[str, Any]:
    """A reproduction is no further run on anybody's dashboard, nor in anybody's store, and nobody
    is there to start it again where the run ended in between."""
    neutral = {"logging.report_to": [], "promote": None, "training.exit_interval": None}
    return {key: value for key, value in neutral.items() if record["placement"].get(key)}


def _without_hub_names(record: dict[str, Any], inputs: Mapping[str, Path]) -> dict[str, None]:
    """A model is where its input is now; the names by which the run had found it say otherwise."""
    models = [key.removesuffix("path") for key in inputs if key.endswith("model.path")]
    keys = [f"{model}{name}" for model in models for name in ("hub", "revision", "hub_dir")]
    return {key: None for key in keys if record["placement"].get(key) is not None}
