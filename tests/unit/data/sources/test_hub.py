"""Hub datasets are read from where they were fetched to, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import write_json
from post_training.core.hashing import sha256_file
from post_training.data.config import DatasetConfig
from post_training.data.sources.hub import RECORD_SCHEMA
from post_training.data.sources.open import open_source

ROWS = [{"text": "one"}, {"text": "two"}]
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


@pytest.mark.stack
def test_hub_dataset_is_read_only_as_it_was_fetched(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "owner--name" / COMMIT / "default" / "train"
    folder.mkdir(parents=True)
    rows = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), rows)
    write_json(folder / "fetched.json", {"schema": RECORD_SCHEMA, "sha256": sha256_file(rows)})
    dataset = hub_dataset(revision=COMMIT, split="train")
    chunks = open_source(dataset, tmp_path).chunks()
    assert [record.value for chunk in chunks for record in chunk.records()] == ROWS
    source = open_source(dataset, tmp_path)
    pq.write_table(pa.Table.from_pylist([*ROWS, *ROWS]), rows)
    with pytest.raises(PostTrainingError, match=r"its bytes are not those of fetched.json"):
        list(source.chunks())
    with pytest.raises(PostTrainingError, match=r"its bytes are not those of fetched.json"):
        open_source(dataset, tmp_path)
