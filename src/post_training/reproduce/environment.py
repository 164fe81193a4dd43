"""The EDF of a reproduction: the recorded image, environment and mounts, for one new run.

A record says which variables were set and, where our runner made them, which mounts. Another engine
keeps its mounts to itself, and no record has annotations (Alps chooses the network plugin by them):
for a job of a site these come from the run's frozen EDF, or else from the site's own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.images.edf import merge_edf, parse_mount
from post_training.images.edf_variables import escape, expand
from post_training.images.render import edf_text, image_environment, site_file
from post_training.images.store import ImageStore
from post_training.records.machine import portable_environment, recorded_environment
from post_training.records.run_record import LAUNCH_FOLDER

_PINS = "POST_TRAINING_IMAGE_"


@dataclass(frozen=True)
class StoredImage:
    """record: the store's."""

    record: dict[str, Any]
    store: ImageStore

    @property
    def squashfs(self) -> Path:
        return self.store.image_path(self.record["sqsh_sha256"])

    @property
    def sif(self) -> Path:
        """Errors: UsageError when there is none."""
        digest = self.record.get("sif_sha256")
        if digest is None:
            raise UsageError(
                "Singularity needs a SIF, and the store has none of this image",
                where=self.record["oci_digest"],
                hint="`make push-sif` makes one, in a checkout of its commit",
            )
        return self.store.sif_path(digest)


@dataclass(frozen=True)
class Surroundings:
    """What an EDF has that a record may lack."""

    mounts: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


HERE = Surroundings()


def site_surroundings(record: Mapping[str, Any], run_dir: Path, repository: Path) -> Surroundings:
    """Of a job of the site that the run was at. Errors: UsageError, ConfigError."""
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
    image: tuple[StoredImage, Path],
    around: Surroundings,
) -> str:
    """All that the run saw, read-only, and the new folder's place on top of it, writable.

    image: with the file that is to be run.
    """
    stored, path = image
    mounts = [f"{folder}:{folder}:ro" for folder in (stored.store.folder, run_dir)]
    for text in [*around.mounts, *record["mounts"]]:
        mount = parse_mount(text, Path("/"))
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
    pins = image_environment(stored.record, path)
    return edf_text(
        {
            "image": str(path),
            "workdir": str(new_dir.parent),
            "entrypoint": False,
            "writable": False,
            "mounts": list(dict.fromkeys(mounts)),
        },
        {"env": {**around.env, **environment, **pins}, "annotations": around.annotations},
    )
