"""One system's files to one of our configurations, checked as the stage would check it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from post_training.config.load import Layer, check_layer, parse_override, set_override
from post_training.core.errors import ConfigError, UsageError, dotted
from post_training.importers.deepspeed import conflicts_with_deepspeed
from post_training.importers.documents import compose, read_with_references
from post_training.importers.translation import Line, Translation, flatten
from post_training.stages.config import StageConfig
from post_training.stages.registry import find_stage

SYSTEMS = {
    "axolotl": "Axolotl's YAML",
    "trl": "the YAML of `trl sft`, `trl dpo` and open-instruct",
    "openeurollm": "OpenEuroLLM's YAML, and its key=value",
    "swissai": "SwissAI's Hydra configuration: the main file, and the words of the command line",
    "neox": "GPT-NeoX's YAML files",
    "llamafactory": "LLaMA-Factory's YAML",
}


@dataclass(frozen=True)
class Request:
    """files: of theirs, with `key=value` among them. drop: keys of theirs to leave out. overrides:
    `key=value` of ours, over what was translated. stage: where the files don't show it; None: as
    they show."""

    system: str
    files: Sequence[str]
    drop: Sequence[str] = ()
    overrides: Sequence[str] = ()
    num_processes: int | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Imported:
    """settings: of the stage, which reads them. lines: what became of each key. hints: what is to
    be done before the run."""

    stage: str
    settings: dict[str, Any]
    lines: list[str]
    hints: list[str]


def import_settings(request: Request) -> Imported:
    """Errors: UsageError for files that can't be read; ConfigError with every key that has no
    counterpart, or with what the stage says of the result."""
    module = _module(request.system)
    data, where = _read(request)
    given = dict(flatten(data, module.WHOLE))
    if hasattr(module, "normalise"):
        given, where = module.normalise(given), module.normalise(where)
    dropped = _drop(given, request.drop)
    # One of their defaults in its place stands nowhere in the files.
    where = {key: place for key, place in where.items() if key not in dropped}
    stage = request.stage or module.choose_stage(given)
    translation = Translation(given, where, request.num_processes, stage)
    defaults = module.defaults_of(translation)
    translation.apply(module.TABLE)
    translation.apply_defaults(module.TABLE, defaults)
    module.finish(translation)
    if translation.faults:
        raise ConfigError(translation.faults)
    for text in request.overrides:
        set_override(translation.settings, parse_override(text))
    evaluation = translation.settings.get("evaluation")
    if evaluation is not None and not evaluation.keys() & {"datasets", "prepared"}:
        del translation.settings["evaluation"]
        named = ", ".join(f"evaluation.{name}" for name in evaluation)
        told = "left out: there are no rows to evaluate on"
        translation.lines.append(Line(named, None, told, has_value=False))
    settings = _in_order(translation.settings)
    config = _check(translation.stage, settings, translation.hints)
    if conflicts := list(conflicts_with_deepspeed(translation, config)):
        hint = "our setting can be set by --set, or the value in DeepSpeed's file to auto"
        raise ConfigError(conflicts, hint=hint)
    lines = [f"{key}: dropped" for key in dropped] + [str(line) for line in translation.lines]
    hints = translation.hints + translation.notes
    return Imported(translation.stage, settings, lines, hints)


def _module(system: str) -> Any:
    if system not in SYSTEMS:
        raise UsageError(f"no importer for {system!r}", hint=f"there are: {', '.join(SYSTEMS)}")
    return import_module(f"post_training.importers.{system}")


def _read(request: Request) -> tuple[dict[str, Any], dict[str, str]]:
    if not request.files:
        raise UsageError("name at least one file")
    if request.system == "swissai":
        main = Path(request.files[0])
        if main.is_dir():
            raise UsageError(
                "name the main file in it: train-sft.yaml or train-preference.yaml", where=str(main)
            )
        return compose(main, request.files[1:])
    words = [word for word in request.files if "=" in word and not Path(word).exists()]
    return read_with_references([Path(word) for word in request.files if word not in words], words)


def _drop(given: dict[str, Any], keys: Sequence[str]) -> list[str]:
    dropped = []
    for key in keys:
        names = [name for name in given if name == key or name.startswith(f"{key}.")]
        if not names and not _drop_part(given, key):
            raise UsageError(f"--drop {key}: there is no such key in the files")
        for name in names:
            del given[name]
        dropped += names or [key]
    return dropped


def _drop_part(given: dict[str, Any], key: str) -> bool:
    """Leave out `datasets[0].split`, a part of a value. False: there is none."""
    path = parse_override(f"{key}=null").path
    for depth in range(1, len(path)):
        whole = dotted(path[:depth])
        if whole not in given:
            continue
        value = here = copy.deepcopy(given[whole])
        try:
            for part in path[depth:-1]:
                here = here[part]
            del here[path[-1]]
        except (KeyError, IndexError, TypeError):
            return False
        given[whole] = value
        return True
    return False


def _in_order(settings: dict[str, Any]) -> dict[str, Any]:
    """As a person would write it: run folder, model, data, what is computed, the rest."""
    first = ["run_dir", "output_base", "seed", "model", "lora", "data", "sft", "dpo", "loss"]
    first += ["reference", "training", "evaluation", "distributed", "checkpointing", "logging"]
    names = [name for name in first if name in settings]
    names += [name for name in settings if name not in names]
    return {name: settings[name] for name in names}


def _check(stage: str, settings: dict[str, Any], hints: Sequence[str]) -> StageConfig:
    layer = Layer(settings, {(): "what was translated"})
    try:
        return check_layer(find_stage(stage).load_config_class(), layer)
    except ConfigError as error:
        told = "; ".join(hints) or error.hint or "add what is missing by --set KEY=VALUE"
        raise ConfigError(error.faults, hint=told) from None
