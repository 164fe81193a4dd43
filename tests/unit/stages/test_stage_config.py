"""What every stage's configuration refuses."""

from pathlib import Path

import pytest

from post_training.config.load import load_config
from post_training.core.errors import ConfigError
from post_training.stages.config import StageConfig
from post_training.stages.registry import STAGES, find_stage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("seed", "limit"),
    [("-1", ">= 0"), ("4294967296", "<= 4294967295"), (f"1{'0' * 23}", "<= 4294967295")],
)
def test_seed_out_of_range_is_refused_with_file_line_and_range(
    stage: str, seed: str, limit: str, tmp_path: Path
):
    path = tmp_path / "cfg.yaml"
    path.write_text(f"num_threads: 1\nseed: {seed}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(find_stage(stage).load_config_class(), path)
    assert f"{path}:2: seed: must be {limit} (got {seed})" in raised.value.faults


def test_seed_at_the_end_of_the_range_is_taken():
    assert StageConfig(seed=2**32 - 1).seed == 2**32 - 1
