"""Every setting says what it is: the text of the reference and of an editor's hover."""

from collections.abc import Iterator
from typing import Any, get_args

from post_training.config.model import Config
from post_training.slurm.pipeline import PipelineConfig
from post_training.slurm.site import Site
from post_training.stages.registry import STAGES
from post_training.train.optim import OPTIMIZERS, SCHEDULES

MOST_CHARACTERS = 300


def models_in(annotation: Any) -> Iterator[type[Config]]:
    """The configuration models in a type, and those in their settings."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_in(field.annotation)
    for argument in get_args(annotation):
        yield from models_in(argument)


ROOTS = [stage.load_config_class() for stage in STAGES.values()]
ROOTS += [Site, PipelineConfig, *OPTIMIZERS.values(), *SCHEDULES.values()]
MODELS = {model.__name__: model for root in ROOTS for model in models_in(root)}
SETTINGS = {
    f"{name}.{key}": field
    for name, model in MODELS.items()
    for key, field in model.model_fields.items()
}


def test_walk_finds_settings_at_every_depth():
    assert {"MessageFields.role", "Storage.scratch", "StageEntry.array", "Lion.betas"} <= set(
        SETTINGS
    )
    assert len(SETTINGS) > 350


def test_every_setting_has_a_description():
    assert [key for key, field in SETTINGS.items() if not field.description] == []


def test_every_description_is_whole_sentences():
    assert [key for key, field in SETTINGS.items() if not field.description.endswith(".")] == []
    assert [key for key, field in SETTINGS.items() if "  " in field.description] == []


def test_every_description_is_short():
    long = {key: len(field.description) for key, field in SETTINGS.items()}
    assert {key: size for key, size in long.items() if size > MOST_CHARACTERS} == {}


def test_every_block_says_what_it_is():
    assert [name for name, model in MODELS.items() if not model.__doc__] == []


def test_settings_are_explained_beside_them_and_not_in_the_docstring_of_their_block():
    twice = [
        f"{name}.{key}"
        for name, model in MODELS.items()
        for key in model.model_fields
        if f"{key}:" in model.__doc__
    ]
    assert twice == []
