import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.jsonl import read_rows


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return path


def test_read_rows_gives_rows_with_their_lines(tmp_path: Path):
    path = write(tmp_path, b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_read_rows_accepts_a_byte_order_mark_at_the_start_only(tmp_path: Path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    rows = read_rows(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(PostTrainingError, match=r"rows.jsonl:2: malformed JSON"):
        next(rows)


def test_read_rows_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = write(tmp_path, json.dumps({"a": text}, ensure_ascii=False).encode() + b"\n")
    assert list(read_rows(path)) == [(1, {"a": text})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1', "malformed JSON: expecting ',' delimiter at column 8"),
        (b"{'a': 1}", "malformed JSON: expecting property name enclosed in double quotes at col"),
        (b'{"a": 1} {"a": 2}', "malformed JSON: extra data at column 10"),
        (b"[1, 2]", "must be a JSON object, one a line (got list)"),
        (b'"text"', "must be a JSON object, one a line (got str)"),
        (b"null", "must be a JSON object, one a line (got NoneType)"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at byte 8 of the line"),
        (b'{"a": "\xc3"}', "not UTF-8: byte 0xc3 at byte 8 of the line"),
        (b'{"a": "\\ud83d"}', "malformed JSON: a \\u escape that is half of a surrogate pair"),
        (b'{"a": "\\uDE42 x"}', "malformed JSON: a \\u escape that is half of a surrogate pair"),
        (b"[" * 100_000, "malformed JSON: maximum recursion depth exceeded"),
        (b'{"a": ' + b"1" * 5000 + b"}", "malformed JSON: Exceeds the limit"),
    ],
)
def test_read_rows_bad_line_is_refused_with_its_number(line: bytes, problem: str, tmp_path: Path):
    path = write(tmp_path, b'{"a": "fine"}\n\n' + line + b"\n")
    with pytest.raises(PostTrainingError) as error:
        list(read_rows(path))
    assert str(error.value).startswith(f"{path}:3: {problem}")


def test_read_rows_escaped_pair_of_surrogates_is_a_character(tmp_path: Path):
    assert list(read_rows(write(tmp_path, b'{"a": "\\ud83d\\ude42"}'))) == [(1, {"a": "🙂"})]


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_read_rows_file_without_a_row_is_refused(content: bytes, tmp_path: Path):
    path = write(tmp_path, content)
    with pytest.raises(PostTrainingError, match="no rows") as error:
        list(read_rows(path))
    assert error.value.where == str(path)


@given(
    rows=st.lists(
        st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1, max_size=5
    ),
    ascii_only=st.booleans(),
)
def test_read_rows_gives_back_what_json_wrote(
    rows: list[dict], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("\n".join(lines).encode())
    assert [row for _, row in read_rows(path)] == rows
