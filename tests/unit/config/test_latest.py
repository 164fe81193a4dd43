"""A folder of a link and a file that names it stands for what is named."""

from pathlib import Path

import pytest

from post_training.config.latest import newest_checkpoint
from post_training.models.config import ModelConfig


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "converted").symlink_to(tmp_path / "elsewhere")
    (root / "iter_0000020").mkdir()
    return root


def test_newest_checkpoint_is_the_one_that_latest_names(root: Path):
    (root / "latest").write_text("converted\n")
    assert newest_checkpoint(root) == root / "converted"
    assert ModelConfig(path=root).path == root / "converted"


def test_newest_checkpoint_is_megatrons_iteration_or_its_release(root: Path):
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    assert newest_checkpoint(root) == root / "iter_0000020"
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    with pytest.raises(ValueError, match="names release, and there is no such folder"):
        newest_checkpoint(root)


def test_model_folder_with_latest_is_itself(root: Path):
    (root / "latest").write_text("converted\n")
    (root / "config.json").write_text("{}")
    assert newest_checkpoint(root) == root


@pytest.mark.parametrize("name", ["../elsewhere", "", "..", "a/b"])
def test_latest_that_names_no_folder_beside_it_is_refused(name: str, root: Path):
    (root / "latest").write_text(name)
    with pytest.raises(ValueError, match="must name a folder beside it"):
        newest_checkpoint(root)


@pytest.mark.parametrize(
    ("file", "system"),
    [
        ("layer_00-model_00-model_states.pt", "GPT-NeoX"),
        ("mp_rank_00_model_states.pt", "GPT-NeoX"),
        ("mp_rank_00/model_optim_rng.pt", "Megatron-LM"),
        ("common.pt", "Megatron-LM"),
    ],
)
def test_checkpoint_of_another_system_is_refused_as_a_model(file: str, system: str, root: Path):
    folder = root / "global_step10"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).touch()
    (root / "latest").write_text("global_step10")
    with pytest.raises(ValueError, match=f"global_step10 is a checkpoint of {system}, not a model"):
        ModelConfig(path=root)
    # A model with such a file beside it is a model, and `convert` takes it as it is.
    assert newest_checkpoint(root) == folder
    (folder / "config.json").write_text("{}")
    assert ModelConfig(path=root).path == folder


def test_folder_that_is_not_there_is_left_as_it_is(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "none") == tmp_path / "none"
