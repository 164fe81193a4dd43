"""A pipeline's file: what refers to what, the order, and the variants of a sweep."""

from pathlib import Path

import pytest

from post_training.core.errors import ConfigError
from post_training.slurm.pipeline import load_pipeline

PIPELINE = """\
run_dir: runs
stages:
  train:
    stage: sft
    config:
      extends: [shared.yaml]
      model: {path: "${stages.base.model}"}
  base: {stage: init-model}
  parts: {stage: split, config: {seed: 1}}
"""
SHARED = 'data: {datasets: [{path: "${stages.parts.dataset}/x.jsonl"}]}\nname: "$${kept}"\n'


@pytest.fixture
def load(tmp_path):
    (tmp_path / "shared.yaml").write_text(SHARED)
    path = tmp_path / "pipeline.yaml"

    def load(*overrides: str, text: str = PIPELINE):
        path.write_text(text)
        return load_pipeline(path, overrides)

    return load


def artifact(name: str, kind: str) -> Path:
    return Path("/made", name, kind)


def test_pipeline_references_make_needs_also_those_of_an_extended_file(load):
    (pipeline,) = load()
    assert pipeline.needs == {"train": ("base", "parts"), "base": (), "parts": ()}
    assert pipeline.order == ("base", "parts", "train")
    data = pipeline.stage_layer("train", artifact).data
    assert data["model"]["path"] == "/made/base/model"
    assert data["data"]["datasets"] == [{"path": "/made/parts/dataset/x.jsonl"}]
    assert data["name"] == "${kept}"


def test_pipeline_override_reaches_into_a_stage(load):
    (pipeline,) = load("stages.parts.config.seed=7", "stages.parts.needs=[base]")
    assert pipeline.stage_layer("parts", artifact).data == {"seed": 7}
    assert pipeline.needs["parts"] == ("base",)


def test_pipeline_sweep_is_every_combination_and_names_the_settings(load):
    sweep = "sweep:\n  stages.parts.config.seed: [1, 2]\n  stages.train.config.loss.name: [a, b]\n"
    variants = load(text=PIPELINE + sweep)
    assert [variant.settings for variant in variants] == [
        {"seed": 1, "name": "a"}, {"seed": 1, "name": "b"},
        {"seed": 2, "name": "a"}, {"seed": 2, "name": "b"},
    ]  # fmt: skip
    assert variants[1].stage_layer("train", artifact).data["loss"] == {"name": "b"}
    assert variants[0].stage_layer("train", artifact).data["loss"] == {"name": "a"}
    assert variants[2].stage_layer("parts", artifact).data == {"seed": 2}


def test_pipeline_sweep_over_the_same_key_of_two_stages_is_named_apart(load):
    sweep = "sweep: {stages.parts.config.seed: [1], stages.train.config.seed: [2]}\n"
    (variant,) = load(text=PIPELINE + sweep)
    assert variant.settings == {"parts.config.seed": 1, "train.config.seed": 2}


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.base.needs=[train]", "stages wait for each other: "),
        ("stages.base.needs=[bse]", "there is no stage 'bse', did you mean 'base'?"),
        ("stages.base.needs=[base]", "stages wait for each other: base -> base"),
        ("stages.base.array=0", "stages.base.array: must be > 0"),
        ("stages.base.nodes=2", "unknown key 'nodes'"),
        ("sweep={run_dir: [a]}", "sweep: must begin with stages."),
        ("sweep={stages.base.config.seed: []}", "must have at least 1"),
        ("stages={}", "stages: must have at least 1"),
        ("stages={a b: {stage: mix}}", "a b"),
        ("stages.train.config.extends=none.yaml", "extends: no such file"),
    ],
)
def test_pipeline_that_cannot_be_is_refused_by_name(load, override, fault):
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert fault in str(caught.value)


@pytest.mark.parametrize("text", ["${stages.base}", "${base.model}", "${stages.base.model", "${}"])
def test_pipeline_malformed_reference_names_file_and_line(load, text):
    (pipeline,) = load(text=PIPELINE.replace("${stages.base.model}", text))
    with pytest.raises(ConfigError) as caught:
        pipeline.stage_layer("train", artifact)
    assert "pipeline.yaml:7: model.path: a reference is ${stages.NAME" in str(caught.value)
