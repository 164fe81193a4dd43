"""Tables of Arrow: what is read of them, and what is refused."""

import datetime as dt
import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from helpers.row_files import read_records, write
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.rows import BadRow
from post_training.data.sources import json_rows as json_file
from post_training.data.sources.open import open_path

ROWS = [{"text": f"row {number}", "number": number} for number in range(2000)]


def write_saved(path: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(path, num_shards=3)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=900)
    return path


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_arrow_rows_are_numbered_and_shown_as_json(kind: str, tmp_path: Path):
    path = tmp_path / f"rows.{kind}"
    (write_parquet if kind == "parquet" else write_saved)(path)
    found = read_records(path)
    assert [record.value for record in found] == ROWS
    assert [record.place.number for record in found] == list(range(1, 2001))
    assert json.loads(found[7].raw) == ROWS[7]


def test_arrow_chunks_are_small_whatever_the_row_groups(tmp_path: Path):
    rows = [{"text": str(number % 10) * 10_000} for number in range(1500)]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    sizes = [len(pickle.dumps(chunk)) for chunk in open_path(path).chunks()]
    assert max(sizes) < 1.2 * json_file.CHUNK_BYTES
    assert [record.value for record in read_records(path)] == rows


def test_arrow_text_that_is_not_utf8_spoils_only_its_row(tmp_path: Path):
    texts = pa.array([b"one", b"tw\xff", b"three"]).view(pa.string())
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    first, second, third = (record.value for record in read_records(path))
    assert (first, third) == ({"text": "one"}, {"text": "three"})
    assert isinstance(second, BadRow)
    assert second.problem == "not UTF-8: byte 0xff at byte 3 of a text"


def test_arrow_file_that_is_broken_or_empty_is_refused(tmp_path: Path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    for content in (b"", b"not parquet at all", whole[: len(whole) // 2]):
        path = write(tmp_path / "rows.parquet", content)
        with pytest.raises(PostTrainingError, match="Arrow can't read it") as error:
            read_records(path)
        assert error.value.where == str(path)
    with pytest.raises(PostTrainingError, match="no rows"):
        read_records(write_parquet(tmp_path / "empty.parquet", ROWS[:0]))


def test_saved_dict_needs_one_of_its_splits(tmp_path: Path):
    parts = {"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:5])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [record.value for record in read_records(tmp_path / "saved", "test")] == ROWS[3:5]
    for split, problem in ((None, "it has several splits"), ("dev", "no split 'dev'")):
        with pytest.raises(UsageError) as error:
            open_path(tmp_path / "saved", split)
        assert error.value.problem == problem
        assert error.value.hint == "set split: train | test"
    with pytest.raises(UsageError, match="no split 'train': it is a single dataset"):
        open_path(tmp_path / "saved" / "train", "train")


def test_saved_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="not a folder that `datasets` saved"):
        open_path(tmp_path)


def test_dates_times_and_decimals_of_a_table_become_text(tmp_path: Path):
    noon = dt.datetime(2024, 5, 1, 12, 30)
    nanoseconds = pa.array([1_714_566_600_000_000_001, 1_714_566_600_000_000_000, None])
    columns = {
        "at": pa.array([noon, None, noon]),
        "zoned": pa.array([noon] * 3, pa.timestamp("s", "+02:00")),
        "ns": nanoseconds.cast(pa.timestamp("ns")),
        "day": pa.array([dt.date(2024, 5, 1)] * 3),
        "time": pa.array([dt.time(12, 30)] * 3),
        "took": pa.array([dt.timedelta(seconds=90.5)] * 3, pa.duration("ms")),
        "price": pa.array([Decimal("1.50")] * 3),
        "deep": pa.array([[{"day": dt.date(2024, 5, 1), "n": 1}], [], None]),
        "id": pa.array([1, 2, 3]),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    first, second, third = (record.value for record in read_records(tmp_path / "rows.parquet"))
    assert first == {
        "at": "2024-05-01T12:30:00",
        "zoned": "2024-05-01T14:30:00+02:00",
        "ns": "2024-05-01T12:30:00.000000001",
        "day": "2024-05-01",
        "time": "12:30:00",
        "took": "PT90.500S",
        "price": "1.50",
        "deep": [{"day": "2024-05-01", "n": 1}],
        "id": 1,
    }
    assert (second["at"], second["ns"], second["deep"]) == (None, "2024-05-01T12:30:00", [])
    assert (third["ns"], third["deep"]) == (None, None)


def test_date_that_python_has_not_is_its_rows_own_fault(tmp_path: Path):
    table = pa.table({"at": pa.array([0, 10**15], pa.int64()).cast(pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "rows.parquet", version="2.6")
    good, bad = (record.value for record in read_records(tmp_path / "rows.parquet"))
    assert good == {"at": "1970-01-01T00:00:00"}
    assert isinstance(bad, BadRow)
    assert bad.problem.startswith("not a date that can be written")


@pytest.mark.parametrize("where", ["start", "middle"])
def test_parquet_file_that_is_damaged_is_refused_with_its_name(where: str, tmp_path: Path):
    path = write_parquet(tmp_path / "rows.parquet")
    content = bytearray(path.read_bytes())
    if where == "start":
        content = bytearray(b"PAR1" + b"x" * 100 + b"PAR1")
    else:
        content[4:600] = b"x" * 596
    path.write_bytes(content)
    with pytest.raises(PostTrainingError, match="Arrow can't read it") as error:
        read_records(path)
    assert error.value.where == str(path)
    assert "\n" not in error.value.problem
