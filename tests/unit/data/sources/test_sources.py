"""Files and folders of rows: what is cut, what is read, what is refused."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.row_files import read_records, write
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.rows import BadRow
from post_training.data.sources import json_rows as json_file
from post_training.data.sources.open import open_path


def test_json_array_is_read_item_by_item_with_its_places(tmp_path: Path):
    content = ' [ {"a": "],[{\\"}"},\n{"a": {"b": [1, {}]}} ,null, {"a": 1,}, {"a": 4}]\n'
    path = write(tmp_path / "rows.json", content)
    found = read_records(path)
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
        assert [record.value for record in read_records(path)] == objects


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n', ' \ufeff{"a": 1}'])
def test_json_file_that_starts_with_an_object_has_one_a_line(content: str, tmp_path: Path):
    path = write(tmp_path / "rows.json", content.strip())
    expected = [json.loads(line) for line in content.replace("\ufeff", "").splitlines()]
    assert [record.value for record in read_records(path)] == expected


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
        read_records(path)
    assert error.value.problem == problem
    assert str(error.value.where).startswith(str(path))


def test_json_array_with_a_comma_too_many_has_a_bad_item(tmp_path: Path):
    [first, second] = read_records(write(tmp_path / "rows.json", '[{"a": 1},]'))
    assert first.value == {"a": 1}
    assert isinstance(second.value, BadRow)


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


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_pipe_or_device_as_a_dataset_is_refused_at_once(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"must be a file or a folder \(is a pipe"):
        open_path(tmp_path / name)
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"must be a file or a folder \(is a device"):
        open_path(tmp_path / "zeros.jsonl")
