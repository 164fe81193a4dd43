"""What a run is, as it is known before it starts: the image is checked and the inputs are hashed
here, on rank 0."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from post_training.config.model import Role, input_paths, recipe_hash, settings_by_role
from post_training.core.errors import ConfigError, UsageError
from post_training.core.hashing import WatchedInputs
from post_training.data.sources.hub import licences_of_fetched
from post_training.images.inside import (
    find_mounts_over_image,
    foreign_variables,
    identify_image,
    missing_path_hint,
    read_development_mount,
    read_mounts,
)
from post_training.models.config import fetch_hint
from post_training.models.reference import REFERENCE
from post_training.records import machine
from post_training.records.artifact import origin_of
from post_training.records.licences import licences_of_models
from post_training.records.run import RunDescription
from post_training.stages.config import StageConfig
from post_training.stages.context import Ranks
from post_training.stages.registry import Stage


def describe_run(
    stage: Stage,
    config: StageConfig,
    ranks: Ranks,
    watched: WatchedInputs,
    *,
    command: Sequence[str],
    unpinned: bool,
) -> RunDescription:
    """command: the arguments as they were given. unpinned: no image digest is asked for.

    Errors: those of the image and the inputs.
    """
    image = None if unpinned else identify_image(os.environ)
    development, mounted_over = read_development_mount(), find_mounts_over_image()
    foreign = foreign_variables(os.environ)
    settings = settings_by_role(config)
    inputs = fingerprint_inputs(settings[Role.INPUT], watched)
    of_all_roles = {key: value for each in settings.values() for key, value in each.items()}
    licences = {**licences_of_models(inputs), **licences_of_fetched(of_all_roles)}
    topology = {k: v for k, v in settings[Role.TOPOLOGY].items() if k != "num_processes"}
    return RunDescription(
        stage=stage.name,
        recipe=settings[Role.RECIPE],
        topology={
            **({"world_size": ranks.world_size} if config.ranks_count else {}),
            **topology,
        },
        inputs=inputs,
        image=image,
        facts={
            "command": ["entrypoint", *command],
            "working_dir": str(Path.cwd()),
            "recipe_hash": recipe_hash(stage.name, config),
            "placement": settings[Role.PLACEMENT],
            "debug": config.debug.enabled,
            "code": {
                "from": "development mount" if development else "image",
                **(development or (image and image["checkout"]) or {}),
            },
            "reproducible_by_digest": image is not None
            and not (development or mounted_over or foreign),
            "mounts": read_mounts(),
            "mounted_over": mounted_over,
            "foreign_variables": foreign,
            "environment": machine.recorded_environment(os.environ),
            "machine": machine.describe_machine(),
            "scheduler_job": machine.scheduler_job(os.environ),
            "packages": machine.installed_packages(),
            **({"licences": licences} if licences else {}),
        },
    )


def fingerprint_inputs(
    settings: dict[str, Any], watched: WatchedInputs
) -> dict[str, dict[str, str]]:
    """{key: {"path", "fingerprint", "made_by" of an artifact}}."""
    inputs, faults, hints = {}, [], []
    for key, path in input_paths(settings).items():
        try:
            found = watched.add(key, Path(path))
            # Read with a file of rows, and no setting of its own; a folder has it within.
            if (beside := Path(path).parent / REFERENCE).exists():
                watched.add(f"{key}.{REFERENCE}", beside)
        except FileNotFoundError:
            faults.append(f"{key}: no such file or folder: {path}")
            hints.append(fetch_hint(Path(path)) or missing_path_hint(Path(path)))
        except UsageError as error:
            faults.append(f"{key}: {error}")
        else:
            inputs[key] = {"path": str(Path(path).absolute()), "fingerprint": found}
            if origin := origin_of(Path(path), found):
                inputs[key]["made_by"] = origin
    if faults:
        raise ConfigError(faults, hint=next(filter(None, hints), None))
    return inputs
