from post_training.config.faults import OTHER_NAMES, paths_of_keys
from post_training.stages.registry import STAGES


def test_other_names_stand_for_settings_that_a_stage_has():
    settings: set[str] = set()
    for stage in STAGES.values():
        for key, paths in paths_of_keys(stage.load_config_class(), but="").items():
            settings |= {key, *paths}
    assert [ours for ours in OTHER_NAMES.values() if " " not in ours and ours not in settings] == []
