"""Hub datasets are read from where they were fetched to, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

from post_training.core.errors import UsageError
from post_training.data.config import DatasetConfig
from post_training.data.sources.open import open_source

COMMIT = "0123456789" * 4


def hub_dataset(**settings: Any) -> DatasetConfig:
    return DatasetConfig(hub="owner/name", **settings)


def test_hub_dataset_that_is_not_fetched_is_refused_with_the_command(tmp_path: Path):
    dataset = hub_dataset(revision=COMMIT, subset="main", split="train")
    with pytest.raises(UsageError) as error:
        open_source(dataset, tmp_path)
    assert error.value.hint == (
        "where there is a network, run: post-training data fetch owner/name "
        f"--revision {COMMIT} --subset main --split train --hub-dir {tmp_path}"
    )


@pytest.mark.parametrize(
    ("settings", "problem", "hint"),
    [
        ({"split": "train"}, "revision: missing", "post-training data fetch owner/name --split tr"),
        ({"revision": COMMIT}, "split: missing", "set split"),
    ],
)
def test_hub_dataset_without_revision_or_split_is_refused(
    settings: dict[str, str], problem: str, hint: str, tmp_path: Path
):
    with pytest.raises(UsageError, match=problem) as error:
        open_source(hub_dataset(**settings), tmp_path)
    assert hint in str(error.value.hint)


def test_hub_dataset_without_a_folder_is_refused():
    with pytest.raises(UsageError, match=r"data.hub_dir: missing"):
        open_source(hub_dataset(revision=COMMIT, split="train"), None)
