"""`post-training reproduce RUN`, the straight way.

The image is found in the store by the recorded digest and verified, the inputs are checked by
fingerprint, the recorded configuration runs again in a new folder with the recorded seeds, threads
and number of processes, and the outputs are compared by sha256.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.files import write_atomic, write_json
from post_training.core.hashing import fingerprint
from post_training.images.commands import open_store
from post_training.images.edf import parse_mount
from post_training.images.render import edf_text, image_environment
from post_training.images.store import ImageStore
from post_training.images.verify import check_image_digest
from post_training.records.compare import compare_runs
from post_training.records.machine import machine, portable_environment
from post_training.records.run_record import CONFIG_NAME, read_record

IDENTICAL, DIFFERS = 0, 4


def reproduce(run_dir: Path, new_dir: Path | None, store_folder: Path | None) -> int:
    """Exit code: 0 identical, 4 differs. Errors: PostTrainingError when it cannot be run again."""
    run_dir = run_dir.absolute()
    record = read_record(run_dir)
    _check_reproducible(record, run_dir)
    store = open_store(store_folder)
    image = _find_image(record, store)
    _check_inputs(record["inputs"])
    new_dir = _choose_new_dir(run_dir, new_dir)
    for line in _machine_differences(record["machine"], machine()):
        print(f"note: {line}", file=sys.stderr)
    print(f"running {record['run_id']} again in {new_dir}", file=sys.stderr)
    _run_again(record, run_dir, new_dir, image, store)
    again = read_record(new_dir)
    comparison = compare_runs(record, run_dir, again, new_dir)
    write_json(
        new_dir / "reproduction.json",
        {"reproduces": record["run_id"], "path": str(run_dir), "verdict": comparison.verdict},
    )
    print(comparison.verdict)
    return DIFFERS if comparison.difference else IDENTICAL


def _check_reproducible(record: dict[str, Any], run_dir: Path) -> None:
    if record["status"] != "finished":
        raise UsageError(f"the run is not finished (it is {record['status']})", where=str(run_dir))
    if record["image"] is None:
        raise UsageError("the run was unpinned: no image digest is recorded", where=str(run_dir))
    if not record["reproducible_by_digest"]:
        raise UsageError(
            "the run used a development mount, so its image digest is not all of its code",
            where=str(run_dir),
            hint=f"check out {record['code'].get('commit')}, apply the recorded diff, and run it",
        )


def _find_image(record: dict[str, Any], store: ImageStore) -> dict[str, Any]:
    """The stored image of the recorded OCI digest, verified; the very file if it is there."""
    wanted = record["image"]
    exact = store.image_path(wanted["sqsh_sha256"])
    image = store.find(wanted["sqsh_sha256"] if exact.exists() else wanted["oci_digest"])
    check_image_digest(store.image_path(image["sqsh_sha256"]), image["sqsh_sha256"])
    return image


def _check_inputs(inputs: dict[str, dict[str, str]]) -> None:
    faults = []
    for key, recorded in inputs.items():
        path = Path(recorded["path"])
        try:
            found = fingerprint(path)
        except FileNotFoundError:
            faults.append(f"{key}: gone: {path}")
            continue
        if found != recorded["fingerprint"]:
            faults.append(
                f"{key}: changed: {path} (fingerprint is {found[:12]}, "
                f"the run had {recorded['fingerprint'][:12]})"
            )
    if faults:
        raise ConfigError(faults, hint="restore the inputs of that run")


def _choose_new_dir(run_dir: Path, chosen: Path | None) -> Path:
    if chosen is not None:
        if chosen.exists() and any(chosen.iterdir()):
            raise UsageError("the folder is not empty", where=str(chosen))
        return chosen.absolute()
    number = 1
    while (candidate := run_dir.with_name(f"{run_dir.name}-reproduced-{number}")).exists():
        number += 1
    return candidate


def _run_again(
    record: dict[str, Any], run_dir: Path, new_dir: Path, image: dict[str, Any], store: ImageStore
) -> None:
    new_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        edf = Path(temporary) / "reproduce.toml"
        write_atomic(edf, _edf(record, run_dir, new_dir, image, store))
        command = [
            sys.executable, "-m", "post_training.cli", "edf", "run", str(edf), "--",
            "entrypoint", record["stage"], str(run_dir / CONFIG_NAME), *_overrides(record, new_dir),
        ]  # fmt: skip
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise PostTrainingError(f"the run failed again with exit code {code}", where=str(new_dir))


def _overrides(record: dict[str, Any], new_dir: Path) -> list[str]:
    """What the configuration left open or relative, as it was."""
    settings = {
        "run_dir": str(new_dir),
        "num_processes": record["topology"].get("world_size", 1),
        "num_threads": record["topology"]["num_threads"],
        **_data_folders(record),
        **_reported_to_nobody(record),
        **{key: value["path"] for key, value in record["inputs"].items()},
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
    record: dict[str, Any], run_dir: Path, new_dir: Path, image: dict[str, Any], store: ImageStore
) -> str:
    """The run's mounts, read-only, and the new folder's place on top of them, writable."""
    path = store.image_path(image["sqsh_sha256"])
    mounts = [f"{store.folder}:{store.folder}:ro", f"{run_dir}:{run_dir}:ro"]
    for text in record["mounts"]:
        mount = parse_mount(text, Path("/"))
        if mount.source.exists():
            mounts.append(f"{mount.source}:{mount.target}:ro")
    for value in record["inputs"].values():
        named = Path(value["path"])
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


def _machine_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What cannot be had again here and may change bits."""
    return [
        f"{key} was {then[key]!r}, here it is {now[key]!r}"
        for key in ("architecture", "processor")
        if then[key] != now[key]
    ]
