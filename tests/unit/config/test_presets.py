"""The presets that ship with the project: each is used here as a user would."""

import pytest

from post_training.config.load import PRESETS_DIR, load_config
from post_training.stages.init_model.config import InitModelConfig


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS_DIR.glob("tiny-*.yaml")))
def test_preset_of_a_tiny_model_needs_only_a_corpus(tmp_path, name):
    (tmp_path / "init.yaml").write_text(f"extends: preset:{name}\ncorpus: [x.jsonl]\n")
    config = load_config(InitModelConfig, tmp_path / "init.yaml").config
    assert name == f"tiny-{config.architecture}"
    assert config.hidden_size == 256
