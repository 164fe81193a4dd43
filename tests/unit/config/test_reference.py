from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, PositiveInt

from post_training.config.model import Config, Role
from post_training.config.reference import (
    Setting,
    explain_lines,
    find_settings,
    list_lines,
    list_settings,
)
from post_training.core.errors import UsageError


class Item(Config):
    """An item."""

    path: Annotated[Path, Role.INPUT] = Field(description="A file.")
    share: Annotated[float, Field(gt=0, lt=1)] | PositiveInt = Field(0.5, description="How much.")


class Block(Config):
    """A block."""

    steps: PositiveInt | None = Field(None, description="Number of steps.")
    items: list[Item] = Field([], description="The items.")


class Whole(Config):
    """All."""

    name: str = Field(description="A name.")
    block: Annotated[Block, Role.PLACEMENT] = Field(Block(), description="The block.")
    files: list[Path] = Field(["a"], description="Files.")


def test_list_settings_walks_blocks_and_items_in_order():
    assert [setting.path for setting in list_settings(Whole)] == [
        "name",
        "block",
        "block.steps",
        "block.items",
        "block.items[].path",
        "block.items[].share",
        "files",
    ]


def test_list_settings_says_type_limits_default_and_role():
    settings = {setting.path: setting for setting in list_settings(Whole)}
    assert settings["name"] == Setting("name", "a string", "required", Role.RECIPE, "A name.")
    assert settings["block"].is_block
    assert settings["block.steps"].kind == "an integer > 0 or null"
    assert settings["block.items[].share"].kind == "a number > 0 and < 1 or an integer > 0"
    assert settings["files"].kind == "a list of paths"
    assert settings["files"].default == "['a']"


def test_list_settings_block_gives_its_role_to_all_below():
    roles = {setting.path: setting.role for setting in list_settings(Whole)}
    assert roles["block.items[].path"] == Role.PLACEMENT


@pytest.mark.parametrize("key", ["block.items", "block.items[0]", "block.items[]"])
def test_find_settings_takes_any_index(key):
    found = [setting.path for setting in find_settings(Whole, key)]
    assert found[-2:] == ["block.items[].path", "block.items[].share"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("steps", "did you mean block.steps?"),
        ("blok", "did you mean block?"),
        ("qqqq", "without KEY all are listed"),
    ],
)
def test_find_settings_unknown_key_offers_the_nearest(key, hint):
    with pytest.raises(UsageError, match=f"no setting '{key}'") as raised:
        find_settings(Whole, key)
    assert raised.value.hint.startswith(hint.rstrip("?"))


def test_lines_for_a_terminal():
    settings = find_settings(Whole, "block.steps")
    assert list_lines(settings) == ["block.steps  an integer > 0 or null, default null"]
    assert explain_lines(settings) == [
        "block.steps: an integer > 0 or null, default null [placement]",
        "    Number of steps.",
    ]
