from pathlib import Path

import pytest

from post_training.core.hashing import hash_files
from post_training.data.prepared import Counts, read_counts, write_prepared
from post_training.data.tokenize import TokenizedRow

pytestmark = pytest.mark.stack

ROWS = [
    TokenizedRow([n, n + 1, n + 2][: 2 + n % 2], [n, -100, n + 2][: 2 + n % 2], n % 3 == 0)
    for n in range(2500)
]


def test_write_prepared_gives_the_rows_back(tmp_path: Path):
    from datasets import Dataset

    write_prepared(tmp_path / "data", ROWS)
    rows = Dataset.from_file(str(tmp_path / "data" / "rows.arrow"))
    assert rows.column_names == ["input_ids", "labels"]
    assert rows[:]["input_ids"] == [row.input_ids for row in ROWS]
    assert rows[:]["labels"] == [row.labels for row in ROWS]


def test_write_prepared_counts_rows_tokens_and_truncations(tmp_path: Path):
    counts = write_prepared(tmp_path / "data", ROWS)
    # The label at position 0 predicts nothing: a row of three has one trained token.
    assert counts == Counts(2500, 1250 * 2 + 1250 * 3, 1250, 834, 3)
    assert read_counts(tmp_path / "data") == counts


def test_write_prepared_gives_the_same_bytes_from_any_iterator(tmp_path: Path):
    write_prepared(tmp_path / "one", ROWS)
    write_prepared(tmp_path / "other", (row for row in ROWS))
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "other")


def test_write_prepared_that_fails_leaves_nothing(tmp_path: Path):
    def failing():
        yield from ROWS
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        write_prepared(tmp_path / "data", failing())
    assert list(tmp_path.iterdir()) == []
