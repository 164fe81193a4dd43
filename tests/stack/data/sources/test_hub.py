"""A dataset of the Hub is read as it was fetched, or not at all."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.files import write_json
from post_training.core.hashing import sha256_file
from post_training.data.config import DatasetConfig
from post_training.data.sources.hub import RECORD_SCHEMA
from post_training.data.sources.open import open_source

ROWS = [{"text": "one"}, {"text": "two"}]
COMMIT = "0123456789" * 4


def test_hub_dataset_is_read_only_as_it_was_fetched(tmp_path: Path):
    folder = tmp_path / "owner--name" / COMMIT / "default" / "train"
    folder.mkdir(parents=True)
    rows = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), rows)
    write_json(folder / "fetched.json", {"schema": RECORD_SCHEMA, "sha256": sha256_file(rows)})
    dataset = DatasetConfig(hub="owner/name", revision=COMMIT, split="train")
    chunks = open_source(dataset, tmp_path).chunks()
    assert [record.value for chunk in chunks for record in chunk.records()] == ROWS
    source = open_source(dataset, tmp_path)
    pq.write_table(pa.Table.from_pylist([*ROWS, *ROWS]), rows)
    with pytest.raises(PostTrainingError, match=r"its bytes are not those of fetched.json"):
        list(source.chunks())
    with pytest.raises(PostTrainingError, match=r"its bytes are not those of fetched.json"):
        open_source(dataset, tmp_path)
