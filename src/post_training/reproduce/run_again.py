"""Run a recorded run again: its configuration, seeds, threads, number of processes, environment.

Its inputs are seen read-only; the new folder is the one place that can be written to.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import write_atomic
from post_training.images.edf import parse_mount
from post_training.images.render import edf_text, image_environment
from post_training.images.store import ImageStore
from post_training.records.machine import portable_environment
from post_training.records.run_record import CONFIG_NAME


def run_again(
    record: dict[str, Any],
    run_dir: Path,
    new_dir: Path,
    inputs: Mapping[str, Path],
    image: dict[str, Any],
    store: ImageStore,
) -> None:
    """Run what `record` of `run_dir` says in `new_dir`. inputs: where each input is now.

    Errors: PostTrainingError when it fails.
    """
    new_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        edf = Path(temporary) / "reproduce.toml"
        write_atomic(edf, _edf(record, run_dir, new_dir, inputs, image, store))
        command = [
            sys.executable, "-m", "post_training.cli", "edf", "run", str(edf), "--",
            "entrypoint", record["stage"], str(run_dir / CONFIG_NAME),
            *_overrides(record, new_dir, inputs),
        ]  # fmt: skip
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise PostTrainingError(f"the run failed again with exit code {code}", where=str(new_dir))


def _overrides(record: dict[str, Any], new_dir: Path, inputs: Mapping[str, Path]) -> list[str]:
    """What the configuration left open or relative, as it was."""
    settings = {
        "run_dir": str(new_dir),
        "num_processes": record["topology"].get("world_size", 1),
        "num_threads": record["topology"]["num_threads"],
        **_data_folders(record),
        **_reported_to_nobody(record),
        **{key: str(path) for key, path in inputs.items()},
    }
    # JSON is YAML: text stays text, whatever it looks like.
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _data_folders(record: dict[str, Any]) -> dict[str, str | None]:
    """The data is prepared anew, not found in a cache; fetched datasets are where they were."""
    placement, folders = record["placement"], {}
    if placement.get("data.cache_dir") is not None:
        folders["data.cache_dir"] = None
    if (hub_dir := placement.get("data.hub_dir")) is not None:
        folders["data.hub_dir"] = str(Path(record["working_dir"]) / hub_dir)
    return folders


def _reported_to_nobody(record: dict[str, Any]) -> dict[str, list[str]]:
    """A reproduction is no further run on anybody's dashboard."""
    return {"logging.report_to": []} if record["placement"].get("logging.report_to") else {}


def _edf(
    record: dict[str, Any],
    run_dir: Path,
    new_dir: Path,
    inputs: Mapping[str, Path],
    image: dict[str, Any],
    store: ImageStore,
) -> str:
    """The run's mounts, read-only, and the new folder's place on top of them, writable."""
    path = store.image_path(image["sqsh_sha256"])
    mounts = [f"{store.folder}:{store.folder}:ro", f"{run_dir}:{run_dir}:ro"]
    for text in record["mounts"]:
        mount = parse_mount(text, Path("/"))
        if mount.source.exists():
            mounts.append(f"{mount.source}:{mount.target}:ro")
    for named in inputs.values():
        mounted = named if named.exists() else named.parent  # a prefix of indexed datasets
        mounts.append(f"{mounted}:{mounted}:ro")
    mounts.append(f"{new_dir.parent}:{new_dir.parent}")
    # Values were expanded when they were recorded; `$${` keeps what is left as it is.
    environment = {
        name: value.replace("${", "$${")
        for name, value in portable_environment(record["environment"]).items()
    }
    return edf_text(
        {
            "image": str(path),
            "workdir": str(new_dir.parent),
            "entrypoint": False,
            "writable": False,
            "mounts": list(dict.fromkeys(mounts)),
        },
        {"env": {**environment, **image_environment(image, path)}},
    )
