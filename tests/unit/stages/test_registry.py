"""The stages by name, and what is said of them."""

import re

import pytest

from post_training.config.reference import find_settings
from post_training.stages.registry import STAGES, find_config_class


@pytest.mark.parametrize("stage", [stage for stage in STAGES.values() if stage.used_as])
def test_next_stage_has_the_setting_that_takes_what_was_made(stage):
    stages, keys = stage.used_as.split(", as ")
    for name in stages.split(" or "):
        for key in keys.split(" and "):
            assert find_settings(STAGES[name].load_config_class(), re.sub(r"\[0\]", "[]", key))


def test_config_class_of_no_stage_is_none():
    assert find_config_class("of-another-time") is None
