from typing import Annotated

from pydantic import Field

from post_training.config.model import (
    ADDED_LATER,
    Config,
    Role,
    changed_settings,
    recipe_hash,
    settings_by_role,
)


class Run(Config):
    learning_rate: float = 0.001
    num_processes: Annotated[int, Role.TOPOLOGY] = 1
    output_dir: Annotated[str, Role.PLACEMENT] = "out"
    dataset: Annotated[str, Role.INPUT] = "data"


def test_recipe_hash_is_the_known_value():
    # sha256 of {"recipe":{"learning_rate":0.001},"stage":"sft"}
    digest = "40e7a4424566b22ce4dd3c2ed089f5cd2ef0100ae5b7beb6a421d18b2bdcd169"
    assert recipe_hash("sft", Run()) == digest


def test_recipe_hash_of_another_setting_or_stage_differs():
    assert recipe_hash("sft", Run(learning_rate=0.002)) != recipe_hash("sft", Run())
    assert recipe_hash("dpo", Run()) != recipe_hash("sft", Run())


def test_recipe_hash_ignores_topology_placement_and_input_names():
    other = Run(num_processes=8, output_dir="elsewhere", dataset="copy")
    assert recipe_hash("sft", other) == recipe_hash("sft", Run())


def test_changed_settings_are_listed_by_key():
    old = {"training.lr": 0.001, "seed": 1, "name": "a", "data": None, "gone": [1]}
    new = {"training.lr": 0.002, "seed": 1, "name": "b", "data": ["x"], "added": True}
    assert changed_settings(old, new) == [
        "added: (absent) -> true",
        "data: null -> ['x']",
        "gone: [1] -> (absent)",
        "name: 'a' -> 'b'",
        "training.lr: 0.001 -> 0.002",
    ]


def test_changed_settings_tell_a_number_from_its_text():
    assert changed_settings({"x": 1}, {"x": "1"}) == ["x: 1 -> '1'"]
    assert changed_settings({"x": 1}, {"x": True}) == ["x: 1 -> true"]


def test_changed_long_setting_is_shown_around_its_first_difference():
    old, new = "x" * 100 + "old", "x" * 100 + "new"
    (line,) = changed_settings({"template": old}, {"template": new})
    assert line == f"template: ...{'x' * 20}old' -> ...{'x' * 20}new'"


def test_changed_long_setting_is_cut_on_both_sides_and_a_short_one_is_not():
    old, new = "a" * 30 + "b" * 100, "a" * 30
    (line,) = changed_settings({"template": old}, {"template": new})
    assert line == f"template: ...{'a' * 20}{'b' * 40}... -> '{'a' * 30}'"


def test_changed_settings_of_equal_runs_are_none():
    assert changed_settings({"x": {"a": 1, "b": [2]}}, {"x": {"b": [2], "a": 1}}) == []


class LaterRun(Run):
    names: Annotated[list[str], ADDED_LATER] = Field(default_factory=list)
    limit: Annotated[int, Role.TOPOLOGY, ADDED_LATER] = 0


def test_setting_added_later_at_its_default_leaves_hash_and_record_as_they_were():
    assert recipe_hash("sft", LaterRun()) == recipe_hash("sft", Run())
    assert settings_by_role(LaterRun()) == settings_by_role(Run())


def test_setting_added_later_that_is_set_is_a_change_of_an_older_record():
    before, now = settings_by_role(Run()), settings_by_role(LaterRun(names=["a"], limit=2))
    assert recipe_hash("sft", LaterRun(names=["a"])) != recipe_hash("sft", Run())
    changed = changed_settings(before[Role.RECIPE], now[Role.RECIPE])
    assert changed == ["names: (absent) -> ['a']"]
    assert changed_settings(before[Role.TOPOLOGY], now[Role.TOPOLOGY]) == ["limit: (absent) -> 2"]
