"""Pairs of .bin and .idx broken in every way, and what can't be written."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    data_path,
    index_path,
    open_kinds,
)

HEADER = 34
SEQUENCES = [[1, 2, 3], [65_499], [4, 5], [6, 7, 8, 9], [10], [11], [12, 13]]


def write(prefix: Path, sequences: list[list[int]], dtype: str = "uint16") -> Path:
    """A pair in which each sequence is a document."""
    with IndexedWriter(prefix, dtype) as writer:
        writer.append(
            np.array([token for sequence in sequences for token in sequence], np.int64),
            np.array([len(sequence) for sequence in sequences], np.int64),
        )
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "chat.v1_text_document", SEQUENCES)


def refusal(prefix: Path) -> str:
    with pytest.raises(PostTrainingError) as error:
        IndexedDataset(prefix)
    return str(error.value)


@pytest.mark.parametrize(("wrong", "dtype"), [(65_536, "uint16"), (-1, "uint16"), (256, "uint8")])
def test_indexed_id_outside_the_dtype_is_refused_and_nothing_is_left(
    tmp_path: Path, wrong: int, dtype: str
):
    with pytest.raises(PostTrainingError, match=f"id {wrong} can't be stored as {dtype}"):
        write(tmp_path / "chat", [[1, 2], [3, wrong, 4]], dtype)
    assert list(tmp_path.iterdir()) == []


def test_indexed_nothing_to_write_is_refused(tmp_path: Path):
    with pytest.raises(PostTrainingError, match="no sequence to write"):
        write(tmp_path / "chat", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bool", "uint64"])
def test_indexed_dtype_that_the_format_lacks_is_refused(dtype: str, tmp_path: Path):
    with pytest.raises(PostTrainingError, match=f"can't be stored as {dtype}"):
        IndexedWriter(tmp_path / "chat", dtype)


def test_indexed_bin_cut_short_is_refused(prefix: Path):
    data_path(prefix).write_bytes(data_path(prefix).read_bytes()[:-2])
    assert refusal(prefix) == (
        f"{data_path(prefix)}: 26 bytes, must be 28: 14 tokens of 2 bytes, as "
        f"{prefix.name}.idx says\n"
        "hint: the file is cut short, or its .idx is of another one: write both again"
    )


def test_indexed_idx_of_another_bin_is_refused(prefix: Path, tmp_path: Path):
    other = write(tmp_path / "other", [[1, 2]])
    index_path(other).replace(index_path(prefix))
    assert "28 bytes, must be 4: 2 tokens" in refusal(prefix)


def test_indexed_bin_that_shrinks_while_open_is_an_error(prefix: Path):
    dataset = IndexedDataset(prefix)
    data_path(prefix).write_bytes(b"\1\0")
    with pytest.raises(PostTrainingError, match="it was longer when it was opened"):
        dataset.read(0)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_indexed_missing_file_is_refused(prefix: Path, suffix: str):
    path = prefix.with_name(f"{prefix.name}.{suffix}")
    path.unlink()
    assert refusal(prefix).startswith(f"{path}: no such file")


@pytest.mark.parametrize(
    ("offset", "layout", "value", "problem"),
    [
        (0, "6s", b"TNTIDX", "the legacy format TNTIDX"),
        (0, "9s", b"PK\3\4zipfi", "not an index: starts with b'PK"),
        (9, "Q", 2, "version 2, must be 1"),
        (17, "B", 6, "dtype code 6 (floats), must be one of 1, 2, 3, 4, 5, 8"),
        (17, "B", 7, "dtype code 7 (floats)"),
        (17, "B", 9, "dtype code 9 (unknown)"),
        (17, "B", 4, "its offsets are not those of its lengths"),
        (18, "Q", 2**60, "must be 13,835,058,055,282,163,810 for 1,152,921,504,606,846,976"),
        (26, "Q", 0, "has no document index"),
        (HEADER, "i", -1, "holds a negative length"),
        (HEADER + 4 * 7 + 8, "q", 4, "its offsets are not those of its lengths"),
        (HEADER + 12 * 7, "q", 1, "its documents run from sequence 1 to 7, must run from 0 to 7"),
        (HEADER + 12 * 7 + 8, "q", 9, "without a step back"),
        (HEADER + 12 * 7 + 56, "q", 6, "from sequence 0 to 6, must run from 0 to 7"),
    ],
)
def test_indexed_garbage_in_the_idx_is_refused(
    prefix: Path, offset: int, layout: str, value: object, problem: str
):
    content = bytearray(index_path(prefix).read_bytes())
    struct.pack_into(f"<{layout}", content, offset, value)
    index_path(prefix).write_bytes(content)
    told = refusal(prefix)
    assert told.startswith(f"{index_path(prefix)}: ")
    assert problem in told


def test_indexed_document_index_path_the_neox_merge_tool_is_refused(prefix: Path):
    content = bytearray(index_path(prefix).read_bytes()[: HEADER + 12 * 7 + 8])
    struct.pack_into("<Q", content, 26, 1)
    index_path(prefix).write_bytes(content)
    assert "its documents run from sequence 0 to 0, must run from 0 to 7" in refusal(prefix)


@given(st.integers(0, 200))
def test_indexed_idx_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length):
    prefix = write(tmp_path_factory.mktemp("cut") / "chat", SEQUENCES)
    whole = index_path(prefix).read_bytes()
    assert HEADER < len(whole) < 200
    index_path(prefix).write_bytes(whole[: min(length, len(whole) - 1)])
    assert refusal(prefix)


@pytest.mark.parametrize(
    ("sequences", "dtype", "problem"),
    [
        ([[0, 1]], "uint8", "not as long as those of chat.v1_text_document"),
        (SEQUENCES, "uint16", "kinds are uint8, not uint16"),
    ],
)
def test_indexed_kinds_of_other_tokens_are_refused(prefix: Path, sequences, dtype, problem):
    kinds = write(prefix.with_name("chat.v1_kinds_document"), sequences, dtype)
    with pytest.raises(PostTrainingError, match=problem):
        open_kinds(kinds, IndexedDataset(prefix))
