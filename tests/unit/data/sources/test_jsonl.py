"""Every line of a JSONL file gets a verdict, with its line and byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.rows import BadRow, Place, Record
from post_training.data.sources import json_rows as jsonl
from post_training.data.sources.json_rows import MAX_DEPTH, JsonlSource, json_line, parse_object
from post_training.data.sources.open import read_objects


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return path


def records(path: Path) -> list[Record]:
    return [record for chunk in JsonlSource(path, str(path)).chunks() for record in chunk.records()]


def rows(path: Path) -> list[tuple[int, int | None, Any]]:
    return [(record.place.number, record.place.byte, record.value) for record in records(path)]


def test_jsonl_rows_have_their_line_and_byte(tmp_path: Path):
    path = write(tmp_path, b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert rows(path) == [(1, 0, {"a": 1}), (4, 14, {"a": 2}), (5, 24, {"a": 3})]
    for record in records(path):
        assert record.place.byte is not None
        assert path.read_bytes()[record.place.byte :].startswith(record.raw)


def test_jsonl_byte_order_mark_is_accepted_at_the_start_only(tmp_path: Path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    first, second = records(path)
    assert first == Record(Place(str(path), 1, 3), {"a": 1}, b'{"a": 1}')
    assert isinstance(second.value, BadRow)


def test_jsonl_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = write(tmp_path, json.dumps({"a": text}, ensure_ascii=False).encode() + b"\n")
    assert rows(path) == [(1, 0, {"a": text})]


BAD_LINES = [
    (b'{"a": 1', "malformed JSON: expecting ',' delimiter at column 8"),
    (
        b"{'a': 1}",
        "malformed JSON: expecting property name enclosed in double quotes at column 2",
    ),
    (b'{"a": 1} {"a": 2}', "more after the object, at column 10"),
    (b'{"a": 1}{"a": 2}', "more after the object, at column 9"),
    (b"12 34", "malformed JSON: extra data at column 4"),
    (b"[1, 2]", "must be a JSON object (got an array)"),
    (b'"text"', "must be a JSON object (got a string)"),
    (b"null", "must be a JSON object (got null)"),
    (b"true", "must be a JSON object (got true or false)"),
    (b'{"a": "\xff"}', "not UTF-8: byte 0xff at byte 8"),
    (b'{"a": "\xc3"}', "not UTF-8: byte 0xc3 at byte 8"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8: byte 0xed at byte 8"),
    (b'{"a": "\\ud83d"}', "half of a surrogate pair at column 8"),
    (b'{"a": "\\uDE42 x"}', "half of a surrogate pair at column 8"),
    (b'{"a": "\\\\\\ud83d\\ud83d\\ude42"}', "half of a surrogate pair at column 10"),
    (b'{"a": 1, "a": 1}', "malformed JSON: key 'a' stands twice in an object"),
    (b'{"a": [{"b": {"c": 1, "c": 2}}]}', "malformed JSON: key 'c' stands twice in an object"),
    (b'{"a": NaN}', "malformed JSON: NaN is no JSON number"),
    (b'{"a": 1e999}', "malformed JSON: 1e999 is beyond the largest number (1.8e308)"),
    (b'{"a": [-Infinity]}', "malformed JSON: -Infinity is no JSON number"),
    (b"[" * 100_000, f"nested more than {MAX_DEPTH} levels deep"),
    (b'{"a":' * 101 + b"1" + b"}" * 101, f"nested more than {MAX_DEPTH} levels deep"),
    (b'{"a": "x\x01"}', "malformed JSON: invalid control character at column 9"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_jsonl_bad_line_gets_a_verdict_and_its_neighbours_are_read(
    line: bytes, problem: str, tmp_path: Path
):
    path = write(tmp_path, b'{"a": "fine"}\n\n' + line + b'\n{"a": "too"}\n')
    first, bad, last = records(path)
    assert (first.value, last.value) == ({"a": "fine"}, {"a": "too"})
    assert isinstance(bad.value, BadRow)
    assert (bad.value.reason, bad.value.problem) == ("malformed", problem)
    assert (bad.place, bad.raw) == (Place(str(path), 3, 15), line)


def test_jsonl_integer_of_thousands_of_digits_is_malformed(tmp_path: Path):
    [record] = records(write(tmp_path, b'{"a": ' + b"1" * 5000 + b"}"))
    assert isinstance(record.value, BadRow)
    assert record.value.problem.startswith("malformed JSON: Exceeds the limit")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b'{"a": "\\ud83d\\ude42"}', {"a": "🙂"}),
        (b'{"a": "\\\\ud83d \\\\\\\\uDE42"}', {"a": "\\ud83d \\\\uDE42"}),
        (b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}", None),
        (b'{"a": "' + b"[{" * 200 + b'"}', {"a": "[{" * 200}),
        (b'{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}),
    ],
)
def test_jsonl_line_that_only_looks_bad_is_read(line: bytes, value: Any, tmp_path: Path):
    [record] = records(write(tmp_path, line))
    assert isinstance(record.value, dict)
    assert value in (None, record.value)


def test_jsonl_verdict_on_depth_does_not_depend_on_the_caller(tmp_path: Path):
    path = write(tmp_path, b'{"a":' + b"[" * 300 + b"]" * 300 + b"}")

    def deeper(levels: int) -> list[Record]:
        return deeper(levels - 1) if levels else records(path)

    assert [str(record.value) for record in deeper(600)] == [
        str(record.value) for record in records(path)
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_jsonl_file_without_a_row_is_refused(content: bytes, tmp_path: Path):
    path = write(tmp_path, content)
    with pytest.raises(PostTrainingError, match="no rows") as error:
        records(path)
    assert error.value.where == str(path)


def test_read_objects_stops_at_the_first_bad_line(tmp_path: Path):
    objects = read_objects(write(tmp_path, b'{"a": 1}\n{"a": }\n'))
    assert next(objects) == {"a": 1}
    with pytest.raises(PostTrainingError, match=r"rows.jsonl:2: malformed JSON"):
        next(objects)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    objects=st.lists(st.dictionaries(st.text(), values), min_size=1, max_size=20),
    ascii_only=st.booleans(),
    chunk_bytes=st.integers(1, 200),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_jsonl_any_chunks_give_back_what_json_wrote(
    objects: list[dict],
    ascii_only: bool,
    chunk_bytes: int,
    end: str,
    tmp_path_factory: pytest.TempPathFactory,
):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    content = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in objects).encode()
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
        found = records(path)
    assert [record.value for record in found] == objects
    lines = content.split(b"\n")
    for record in found:
        assert record.place.byte is not None
        assert content[record.place.byte :].startswith(record.raw)
        assert lines[record.place.number - 1].rstrip(b"\r") == record.raw


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"a": 1, "b": [float("nan")]}, "b: can't be written as JSON: out of range float values"),
        ({"a": {"c": b"x"}, "b": 1}, "a: can't be written as JSON: object of type bytes is not"),
        ({"a": "\ud800"}, "a text holds half a character (lone surrogate)"),
    ],
)
def test_row_that_would_not_be_read_again_is_not_written(row: dict, problem: str):
    with pytest.raises(BadRow) as bad:
        json_line(row)
    assert bad.value.problem.startswith(problem)


def test_row_is_written_as_it_is_read_again():
    row = {"a": "\u2028 Zo\u00eb", "b": 10**400, "c": [1.5e308, None, {"d": ""}]}
    assert parse_object(json_line(row)[:-1]) == row
