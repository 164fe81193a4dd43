"""Annotation stages in this process, as execute.py runs them but without a record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_training.config.model import Role, settings_by_role
from post_training.core.hashing import WatchedInputs
from post_training.records.run import RunDescription
from post_training.stages.context import Result, StageContext
from post_training.stages.describe import fingerprint_inputs
from post_training.stages.registry import find_stage


def run_stage(
    name: str,
    config: dict[str, Any],
    run_dir: Path,
    change: Callable[[], object] = lambda: None,
) -> Result:
    """change: of the inputs, after their fingerprints were taken."""
    stage = find_stage(name)
    model = stage.load_config_class().model_validate(config)
    folder = model.record_dir(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    roles, watched = settings_by_role(model), WatchedInputs()
    description = RunDescription(
        stage=name,
        recipe=roles[Role.RECIPE],
        topology=roles[Role.TOPOLOGY],
        inputs=fingerprint_inputs(roles[Role.INPUT], watched),
        image=None,
        facts={},
    )
    change()
    context = StageContext(
        folder,
        input_fingerprints=description.input_fingerprints,
        description=description,
        inputs=watched,
    )
    return stage.load_run()(model, context)
