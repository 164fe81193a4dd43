"""What a pipeline comes to: a run for each stage, in a folder that is named for what it computes.

    PIPELINE/NAME-xxxxxxxx/   the hash is of the stage, its version, recipe and inputs' content; for
                              what another stage of the pipeline makes, that stage's own hash

So a run that is finished in its folder needs no second one, a changed setting leads to another
folder for that stage and for those behind it, and variants of a sweep share what is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from post_training.config.faults import nearest
from post_training.config.load import check_layer
from post_training.config.model import Role, settings_by_role
from post_training.config.recipe import changed_settings
from post_training.core.errors import ConfigError, UsageError
from post_training.core.hashing import fingerprint, sha256_value
from post_training.core.known_digests import sha256_of_any
from post_training.core.messages import shown
from post_training.launch.pipeline import Pipeline, load_pipeline
from post_training.stages.config import StageConfig
from post_training.stages.execute import input_paths
from post_training.stages.registry import find_stage

_HASH_CHARACTERS = 8


@dataclass(frozen=True)
class PlannedRun:
    """name: of the stage in the pipeline, with the swept settings that are its own. stage: the
    verb. config: whole, with its run_dir. needs: run folders that must be finished before.
    num_workers, scheduler: as the pipeline has them."""

    name: str
    stage: str
    config: StageConfig
    run_dir: Path
    needs: tuple[Path, ...]
    num_workers: int | None
    scheduler: dict[str, str | int]


@dataclass(frozen=True)
class Plan:
    """runs: each after those it needs. folder: of the pipeline."""

    folder: Path
    runs: tuple[PlannedRun, ...]


def plan_pipeline(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The runs of all variants. Errors: ConfigError; UsageError for an unknown stage, and for
    variants that differ in topology or placement alone."""
    variants = load_pipeline(path, overrides)
    folder = variants[0].config.run_dir.resolve()
    fingerprints: dict[str, str] = {}
    runs: dict[Path, PlannedRun] = {}
    settings: dict[Path, list[dict[str, Any]]] = {}
    for variant in variants:
        for run in _runs(variant, folder, fingerprints):
            other = runs.setdefault(run.run_dir, run)
            if changed := changed_settings(_settings(other), _settings(run)):
                raise UsageError(
                    f"sweep: variants of {run.name} have one recipe, so one folder would have "
                    f"both ({'; '.join(changed)})",
                    where=str(path),
                    hint="sweep settings of the recipe, or run each with a run_dir= of its own",
                )
            settings.setdefault(run.run_dir, []).append(variant.settings)
    return Plan(
        folder,
        tuple(
            replace(run, name=_name(run.name, settings[run.run_dir], variants))
            for run in runs.values()
        ),
    )


def _settings(run: PlannedRun) -> dict[str, Any]:
    """Those that the run folder is not named for."""
    roles = settings_by_role(run.config)
    return roles[Role.TOPOLOGY] | roles[Role.PLACEMENT]


def _name(name: str, of_its_variants: list[dict[str, Any]], variants: list[Pipeline]) -> str:
    """`train[seed=1]`: what the run's variants have in common, and not all variants have."""
    own = [
        f"{key}={shown(value)}"
        for key, value in of_its_variants[0].items()
        if all(other[key] == value for other in of_its_variants)
        and not all(variant.settings[key] == value for variant in variants)
    ]
    return f"{name}[{','.join(own)}]" if own else name


def _runs(variant: Pipeline, folder: Path, fingerprints: dict[str, str]) -> list[PlannedRun]:
    runs: dict[str, PlannedRun] = {}

    def artifact_path(name: str, artifact: str) -> Path:
        if name not in runs:
            known = nearest(name, list(variant.config.stages))
            raise UsageError(f"there is no stage {name!r}{known}")
        artifacts = find_stage(runs[name].stage).artifacts
        if artifact not in artifacts:
            left = " or ".join(artifacts)
            raise UsageError(f"{runs[name].stage} leaves no {artifact!r} (it leaves {left})")
        return runs[name].run_dir / artifact

    for name in variant.order:
        entry = variant.config.stages[name]
        stage = find_stage(entry.stage)
        config = check_layer(stage.load_config_class(), variant.stage_layer(name, artifact_path))
        if config.debug.override_existing:
            raise UsageError(
                "debug.override_existing: a stage that runs again would remove its checkpoints",
                where=f"stages.{name}",
            )
        if entry.array is not None and "workers" not in type(config).model_fields:
            raise UsageError(
                f"array: {stage.name} is not done in chunks, which several jobs could share",
                where=f"stages.{name}",
            )
        roles = settings_by_role(config)
        made = [runs[other].run_dir for other in variant.needs[name]]
        identity = {
            "stage": stage.name,
            "version": config.version,
            "recipe": roles[Role.RECIPE],
            "inputs": _input_content(name, roles[Role.INPUT], made, fingerprints),
        }
        run_dir = folder / f"{name}-{sha256_value(identity)[:_HASH_CHARACTERS]}"
        runs[name] = PlannedRun(
            name,
            stage.name,
            config.model_copy(update={"run_dir": run_dir}),
            run_dir,
            tuple(made),
            entry.array,
            entry.scheduler,
        )
    return list(runs.values())


def _input_content(
    name: str, settings: dict[str, Any], made: Sequence[Path], fingerprints: dict[str, str]
) -> dict[str, str]:
    """{key: what decides the input's content}. Errors: ConfigError for what is not there."""
    content, missing = {}, []
    for key, text in input_paths(settings).items():
        path = Path(text).absolute()
        producer = next((folder for folder in made if path.is_relative_to(folder)), None)
        if producer is not None:
            content[key] = f"{producer.name}/{path.relative_to(producer)}"
            continue
        try:
            if text not in fingerprints:
                # Names the folder, no more: the run itself reads every byte before it starts.
                fingerprints[text] = fingerprint(path, sha256_of_any)
            content[key] = fingerprints[text]
        except FileNotFoundError:
            missing.append(f"stages.{name}: {key}: no such file or folder: {text}")
    if missing:
        raise ConfigError(missing)
    return content
