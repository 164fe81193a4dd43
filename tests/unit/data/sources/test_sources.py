"""Files and folders of rows: what is cut, what is read, what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.rows import BadRow, Record
from post_training.data.sources import json_rows as json_file
from post_training.data.sources.open import open_path

ROWS = [{"text": f"row {number}", "number": number} for number in range(2000)]


def records(path: Path, split: str | None = None) -> list[Record]:
    """Of each chunk as another process gets it."""
    return [
        record
        for chunk in open_path(path, split).chunks()
        for record in pickle.loads(pickle.dumps(chunk)).records()
    ]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_saved(path: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(path, num_shards=3)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=900)
    return path


def test_json_array_is_read_item_by_item_with_its_places(tmp_path: Path):
    content = ' [ {"a": "],[{\\"}"},\n{"a": {"b": [1, {}]}} ,null, {"a": 1,}, {"a": 4}]\n'
    path = write(tmp_path / "rows.json", content)
    found = records(path)
    assert [record.place.number for record in found] == [1, 2, 3, 4, 5]
    for record in found:
        assert record.place.byte is not None
        assert path.read_bytes()[record.place.byte :].startswith(record.raw)
    assert found[0].value == {"a": '],[{"}'}
    assert found[1].value == {"a": {"b": [1, {}]}}
    assert isinstance(found[2].value, BadRow)
    assert found[2].value.problem == "must be a JSON object (got null)"
    assert isinstance(found[3].value, BadRow)
    assert found[4].value == {"a": 4}


@given(
    objects=st.lists(
        st.dictionaries(st.text(), st.text() | st.lists(st.text(), max_size=2), max_size=3),
        min_size=1,
        max_size=8,
    ),
    chunk_bytes=st.integers(8, 60),
    indent=st.sampled_from([None, 2]),
)
def test_json_array_cut_anywhere_gives_back_what_json_wrote(
    objects: list[dict],
    chunk_bytes: int,
    indent: int | None,
    tmp_path_factory: pytest.TempPathFactory,
):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(objects, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_file, "CHUNK_BYTES", chunk_bytes)
        assert [record.value for record in records(path)] == objects


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n', ' \ufeff{"a": 1}'])
def test_json_file_that_starts_with_an_object_has_one_a_line(content: str, tmp_path: Path):
    path = write(tmp_path / "rows.json", content.strip())
    expected = [json.loads(line) for line in content.replace("\ufeff", "").splitlines()]
    assert [record.value for record in records(path)] == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no rows"),
        (" \n", "no rows"),
        ("[]", "no rows"),
        ("[\n]", "no rows"),
        ('[{"a": 1}', "the array does not end, or a bracket or quote of an item is missing"),
        ('[{"a": "1}]', "the array does not end, or a bracket or quote of an item is missing"),
        ('[{"a": 1}] {"a": 2}', "more after the array: b'{\"a\": 2}'"),
        ('"text"', "must be an array of objects (starts with b'\"text\"')"),
    ],
)
def test_json_file_that_is_no_array_of_objects_is_refused(
    content: str, problem: str, tmp_path: Path
):
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(PostTrainingError) as error:
        records(path)
    assert error.value.problem == problem
    assert str(error.value.where).startswith(str(path))


def test_json_array_with_a_comma_too_many_has_a_bad_item(tmp_path: Path):
    [first, second] = records(write(tmp_path / "rows.json", '[{"a": 1},]'))
    assert first.value == {"a": 1}
    assert isinstance(second.value, BadRow)


@pytest.mark.stack
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_arrow_rows_are_numbered_and_shown_as_json(kind: str, tmp_path: Path):
    path = tmp_path / f"rows.{kind}"
    (write_parquet if kind == "parquet" else write_saved)(path)
    found = records(path)
    assert [record.value for record in found] == ROWS
    assert [record.place.number for record in found] == list(range(1, 2001))
    assert json.loads(found[7].raw) == ROWS[7]


@pytest.mark.stack
def test_arrow_chunks_are_small_whatever_the_row_groups(tmp_path: Path):
    rows = [{"text": str(number % 10) * 10_000} for number in range(1500)]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    sizes = [len(pickle.dumps(chunk)) for chunk in open_path(path).chunks()]
    assert max(sizes) < 1.2 * json_file.CHUNK_BYTES
    assert [record.value for record in records(path)] == rows


@pytest.mark.stack
def test_arrow_text_that_is_not_utf8_spoils_only_its_row(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"one", b"tw\xff", b"three"]).view(pa.string())
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    first, second, third = (record.value for record in records(path))
    assert (first, third) == ({"text": "one"}, {"text": "three"})
    assert isinstance(second, BadRow)
    assert second.problem == "not UTF-8: byte 0xff at byte 3 of a text"


@pytest.mark.stack
def test_arrow_file_that_is_broken_or_empty_is_refused(tmp_path: Path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    for content in (b"", b"not parquet at all", whole[: len(whole) // 2]):
        path = write(tmp_path / "rows.parquet", content)
        with pytest.raises(PostTrainingError, match="Arrow can't read it") as error:
            records(path)
        assert error.value.where == str(path)
    with pytest.raises(PostTrainingError, match="no rows"):
        records(write_parquet(tmp_path / "empty.parquet", ROWS[:0]))


@pytest.mark.stack
def test_saved_dict_needs_one_of_its_splits(tmp_path: Path):
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:5])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [record.value for record in records(tmp_path / "saved", "test")] == ROWS[3:5]
    for split, problem in ((None, "it has several splits"), ("dev", "no split 'dev'")):
        with pytest.raises(UsageError) as error:
            open_path(tmp_path / "saved", split)
        assert error.value.problem == problem
        assert error.value.hint == "set split: train | test"
    with pytest.raises(UsageError, match="no split 'train': it is a single dataset"):
        open_path(tmp_path / "saved" / "train", "train")


@pytest.mark.stack
def test_saved_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="not a folder that `datasets` saved"):
        open_path(tmp_path)


def test_open_source_names_what_is_there_to_choose(tmp_path: Path):
    with pytest.raises(UsageError, match="no such file or folder"):
        open_path(tmp_path / "rows.jsonl")
    path = write(tmp_path / "rows.csv", "a,b")
    with pytest.raises(UsageError) as error:
        open_path(path)
    assert error.value.problem == (
        "unknown kind of file '.csv'; known: .jsonl, .ndjson, .json, .parquet, "
        "or a folder that `datasets` saved"
    )
    with pytest.raises(UsageError, match="a file has no split 'train'"):
        open_path(write(tmp_path / "rows.jsonl", "{}"), "train")


@pytest.mark.stack
def test_dates_times_and_decimals_of_a_table_become_text(tmp_path: Path):
    import datetime as dt
    from decimal import Decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

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
    first, second, third = (record.value for record in records(tmp_path / "rows.parquet"))
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


@pytest.mark.stack
def test_date_that_python_has_not_is_its_rows_own_fault(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"at": pa.array([0, 10**15], pa.int64()).cast(pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "rows.parquet", version="2.6")
    good, bad = (record.value for record in records(tmp_path / "rows.parquet"))
    assert good == {"at": "1970-01-01T00:00:00"}
    assert isinstance(bad, BadRow)
    assert bad.problem.startswith("not a date that can be written")


@pytest.mark.stack
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
        records(path)
    assert error.value.where == str(path)
    assert "\n" not in error.value.problem


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_pipe_or_device_as_a_dataset_is_refused_at_once(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"must be a file or a folder \(is a pipe"):
        open_path(tmp_path / name)
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"must be a file or a folder \(is a device"):
        open_path(tmp_path / "zeros.jsonl")
