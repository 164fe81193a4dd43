import struct

import pytest

from post_training.records.first_difference import first_row_difference


def write_npy(path, values, shape):
    header = str({"descr": "<i8", "fortran_order": False, "shape": shape}).encode()
    header = header.ljust(117) + b"\n"
    data = struct.pack(f"<{len(values)}q", *values)
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)


def write_sequences(folder, name, sequences, code, letter):
    lengths = [len(sequence) for sequence in sequences]
    size = struct.calcsize(letter)
    places = [size * sum(lengths[:index]) for index in range(len(lengths))]
    num = len(lengths)
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, num, num + 1)
    index += struct.pack(f"<{num}i{num}q{num + 1}q", *lengths, *places, *range(num + 1))
    (folder / f"{name}.idx").write_bytes(index)
    data = [struct.pack(f"<{len(items)}{letter}", *items) for items in sequences]
    (folder / f"{name}.bin").write_bytes(b"".join(data))


@pytest.fixture
def difference(tmp_path):
    """Of two datasets; each is rows of pieces (sequence, start, length), sequences and kinds."""

    def find(one, other, *, pairs=False):
        for name, (rows, tokens, kinds) in (("one", one), ("other", other)):
            folder = tmp_path / name
            folder.mkdir()
            offsets = [sum(map(len, rows[:index])) for index in range(len(rows) + 1)]
            pieces = [value for row in rows for piece in row for value in piece]
            write_npy(folder / "row_offsets.npy", offsets, (len(offsets),))
            write_npy(folder / "row_pieces.npy", pieces, (len(pieces) // 3, 3))
            write_sequences(folder, "tokens", tokens, 4, "i")
            write_sequences(folder, "kinds", kinds, 1, "B")
            if pairs:
                (folder / "pairs.npy").touch()
        return first_row_difference(tmp_path / "one", tmp_path / "other")

    return find


ROWS = [[(0, 0, 3)], [(1, 0, 2), (2, 1, 1)]]
TOKENS = [[5, 6, 7], [8, 9], [10, 11]]
KINDS = [[0, 1, 1], [0, 1], [0, 1]]


def test_rows_that_are_equal_have_no_difference_however_they_lie(difference):
    moved = [[(1, 0, 3)], [(0, 0, 2), (2, 1, 1)]]
    tokens, kinds = [TOKENS[1], TOKENS[0], TOKENS[2]], [KINDS[1], KINDS[0], KINDS[2]]
    assert difference((ROWS, TOKENS, KINDS), (moved, tokens, kinds)) is None


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ((ROWS, [[5, 6, 7], [8, 9], [10, 12]], KINDS), "row 1: token 2 is 11, then 12"),
        ((ROWS, [[5, 6, 7], [8, 9], [12, 11]], KINDS), None),
        ((ROWS, TOKENS, [[0, 1, 2], *KINDS[1:]]),
         "row 0: the same tokens, and token 2 is completion, then excluded"),
        (([[(0, 0, 2)], ROWS[1]], TOKENS, KINDS), "row 0: 3 tokens, then 2"),
        ((ROWS[:1], TOKENS, KINDS), "2 rows, then 1"),
        ((ROWS[::-1], TOKENS, KINDS), "row 0: token 0 is 5, then 8"),
        (([[(0, 0, 1), (0, 1, 2)], ROWS[1]], TOKENS, KINDS),
         "row 0: the same tokens, of other sequences"),
    ],
)  # fmt: skip
def test_rows_first_that_differs_is_told(difference, other, text):
    assert difference((ROWS, TOKENS, KINDS), other) == text


def test_rows_of_pairs_are_whole_sequences(difference):
    rows, other = [[(0, 0, 9)]], [[5, 6, 8], *TOKENS[1:]]
    told = difference((rows, TOKENS, KINDS), (rows, other, KINDS), pairs=True)
    assert told == "row 0: token 2 is 7, then 8"


def test_rows_of_no_prepared_dataset_have_no_difference(tmp_path):
    assert first_row_difference(tmp_path, tmp_path) is None


NAMES = ("row_offsets.npy", "row_pieces.npy", "tokens.idx", "tokens.bin", "kinds.idx", "kinds.bin")


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_files_that_are_cut_off_fail_as_is_said(difference, tmp_path, name):
    assert difference((ROWS, TOKENS, KINDS), (ROWS, TOKENS, KINDS)) is None
    whole = (tmp_path / "one" / name).read_bytes()
    failed = []
    for size in range(len(whole)):
        (tmp_path / "one" / name).write_bytes(whole[:size])
        try:
            first_row_difference(tmp_path / "one", tmp_path / "other")
        except (OSError, ValueError, LookupError, struct.error) as error:
            failed.append(error)
    assert failed
