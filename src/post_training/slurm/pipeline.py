"""A pipeline's file: stages that hand artifacts to each other, and settings to be swept over.

    run_dir: runs/arithmetic              # every stage's run folder is below it
    stages:
      base:
        stage: init-model
        config: {extends: init.yaml}      # a stage's configuration, as a file would have it
      train:
        stage: sft
        config:
          extends: [sft.yaml]             # relative to this file
          model: {path: "${stages.base.model}"}
        scheduler: {nodes: 2, time: "06:00:00"}
    sweep:
      stages.train.config.training.learning_rate: [1e-4, 5e-5]

A reference, `${stages.NAME.ARTIFACT}`, is the path of what another stage leaves, and makes this one
wait for it; `needs` names stages to wait for besides. `$${` stands for `${`. `array: N` divides a
stage's chunks among N jobs. Further files (`extends`), and overrides from the command line, work as
in any configuration. A sweep makes a variant for each combination of its values.

The plan of a pipeline is a run for each stage of each variant, in a folder named for what it
computes: PIPELINE/NAME-xxxxxxxx. The hash is of the stage, its version, its recipe and the content
of its inputs; for what another stage of the pipeline makes, that stage's own hash stands. So a run
that is finished in its folder needs no second one, a changed setting leads to another folder for
that stage and for those behind it, and variants of a sweep share what is the same.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, StringConstraints

from post_training.config.faults import nearest
from post_training.config.load import (
    Layer,
    Override,
    check_layer,
    parse_override,
    read_layer,
    read_section,
)
from post_training.config.model import (
    Config,
    Role,
    changed_settings,
    input_paths,
    settings_by_role,
)
from post_training.core.errors import ConfigError, KeyPath, UsageError, dotted, shown
from post_training.core.hashing import fingerprint, sha256_of_any, sha256_value
from post_training.stages.config import StageConfig
from post_training.stages.registry import find_stage

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
_REFERENCE = re.compile(r"\$(\$?)\{([^}]*)\}?")
_HASH_CHARACTERS = 8


class StageEntry(Config):
    """A stage of a pipeline."""

    stage: str = Field(description="Name of the stage, as for `entrypoint`.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="The stage's configuration, as a file would have it. Texts may hold references "
        "${stages.NAME.ARTIFACT}.",
    )
    needs: tuple[str, ...] = Field(
        (), description="Stages that must have finished, besides those that config refers to."
    )
    array: PositiveInt | None = Field(
        None, description="Jobs that share the chunks of an annotation stage. By default one."
    )
    scheduler: dict[str, str | int] = Field(
        default_factory=dict,
        description="Settings of the site's scheduler that differ for this stage, such as nodes or "
        "time.",
    )


class PipelineConfig(Config):
    """A pipeline's file."""

    run_dir: Path = Field(description="Folder of the pipeline; every run folder is below it.")
    stages: dict[Name, StageEntry] = Field(
        min_length=1,
        description="{name: stage}, at least one. Names are letters, digits, _ and -, since they "
        "name folders and stand in references.",
    )
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="{key as on the command line: its values}. There is a variant of the pipeline "
        "for each combination.",
    )


@dataclass(frozen=True)
class Pipeline:
    """One variant.

    settings: the swept ones, by the last part of their keys.
    order: the stages' names, each after those it needs.
    needs: of each stage, in the file's order.
    layers: the stages' settings, with what they extend, unchecked.
    """

    config: PipelineConfig
    settings: dict[str, Any]
    order: tuple[str, ...]
    needs: dict[str, tuple[str, ...]]
    layers: dict[str, Layer]

    def stage_layer(self, name: str, artifact_path: Callable[[str, str], Path]) -> Layer:
        """The settings of the stage, with its references resolved: artifact_path(stage, artifact).

        Errors: ConfigError; UsageError of `artifact_path`.
        """
        layer = self.layers[name]
        faults: list[str] = []

        def replaced(text: str, path: KeyPath) -> str:
            def found(match: re.Match[str]) -> str:
                if match[1]:
                    return match[0][1:]
                try:
                    return str(artifact_path(*_reference(match, text)))
                except UsageError as error:
                    faults.append(f"{layer.origin(path)}: {dotted(path)}: {error.problem}")
                    return ""

            return _REFERENCE.sub(found, text)

        resolved = layer.with_texts(replaced)
        if faults:
            raise ConfigError(faults)
        return resolved


@dataclass(frozen=True)
class PlannedRun:
    """A stage to be run.

    name: of the stage in the pipeline, with the swept settings that are its own.
    stage: as for entrypoint.
    config: whole, with its run_dir.
    needs: run folders that must be finished before.
    num_workers: tasks that share its chunks; scheduler: settings for this stage alone.
    """

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


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> list[Pipeline]:
    """The variants of the sweep; without one, the pipeline alone. Errors: ConfigError."""
    layer = read_layer(path, overrides)
    sweep = check_layer(PipelineConfig, layer).sweep
    if not sweep:
        return [_variant(path, layer, {})]
    variants = []
    names = _short_names(list(sweep), layer)
    for values in product(*sweep.values()):
        changed = layer.copied()
        for key, value in zip(sweep, values, strict=True):
            where = layer.origin(("sweep", key))
            try:
                key_path = parse_override(f"{key}=0").path
                changed.set(Override(f"{key}={value}", key_path, value))
            except UsageError as error:
                raise ConfigError([f"{where}: {error}"]) from None
            changed.origins[key_path] = where
        settings = dict(zip(names, values, strict=True))
        variants.append(_variant(path, changed, settings))
    return variants


def _short_names(keys: Sequence[str], layer: Layer) -> list[str]:
    """The shortest ends of the keys that differ: `learning_rate`, or else `training.seed`."""
    for key in keys:
        if not key.startswith("stages."):
            where = layer.origin(("sweep", key))
            raise ConfigError([f"{where}: sweep: must begin with stages. (got {shown(key)})"])
    longest = max(key.count(".") for key in keys) + 1
    for length in range(1, longest):
        names = [".".join(key.split(".")[-length:]) for key in keys]
        if len(set(names)) == len(names):
            return names
    return list(keys)


def _variant(path: Path, layer: Layer, settings: Mapping[str, Any]) -> Pipeline:
    config = check_layer(PipelineConfig, layer)
    layers = {name: _stage_layer(path, layer, name) for name in config.stages}
    needs, faults = {}, []
    for name, entry in config.stages.items():
        needed = {*entry.needs, *_referred(layers[name].data)}
        for other in sorted(needed - config.stages.keys()):
            where = layer.origin(("stages", name))
            known = nearest(other, list(config.stages))
            faults.append(f"{where}: stages.{name}: there is no stage {other!r}{known}")
        needs[name] = tuple(other for other in config.stages if other in needed)
    if faults:
        raise ConfigError(faults)
    try:
        order = tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError([f"{path}: stages wait for each other: {circle}"]) from None
    return Pipeline(config, dict(settings), order, needs, layers)


def _stage_layer(path: Path, layer: Layer, name: str) -> Layer:
    if "config" not in layer.data["stages"][name]:
        return Layer({}, {(): layer.origin(("stages", name))})
    return read_section(layer.section(("stages", name, "config")), path)


def _referred(value: Any) -> set[str]:
    """The stages that the texts of a configuration refer to; faulty references are told later."""
    if isinstance(value, dict):
        return set().union(*map(_referred, value.values()))
    if isinstance(value, list):
        return set().union(*map(_referred, value))
    if not isinstance(value, str):
        return set()
    words = [match[2].split(".") for match in _REFERENCE.finditer(value) if not match[1]]
    return {parts[1] for parts in words if len(parts) == 3 and parts[0] == "stages"}


def _reference(match: re.Match[str], text: str) -> tuple[str, str]:
    parts = match[2].split(".")
    if not match[0].endswith("}") or len(parts) != 3 or parts[0] != "stages":
        raise UsageError(
            f"a reference is ${{stages.NAME.ARTIFACT}}, and a plain ${{ is $${{ (got {shown(text)})"
        )
    return parts[1], parts[2]


def _runs(variant: Pipeline, folder: Path, fingerprints: dict[str, str]) -> list[PlannedRun]:
    runs: dict[str, PlannedRun] = {}

    def artifact_path(name: str, artifact: str) -> Path:
        if name not in runs:
            known = nearest(name, list(variant.config.stages))
            raise UsageError(f"there is no stage {name!r}{known}")
        run = runs[name]
        artifacts = run.config.own_artifacts or find_stage(run.stage).artifacts
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


def _settings(run: PlannedRun) -> dict[str, Any]:
    """The settings that the run folder is not named for."""
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
