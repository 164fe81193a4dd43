from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import UsageError
from post_training.core.hashing import hash_files
from post_training.data.config import DataConfig, SequenceConfig
from post_training.data.prepared.dataset import PreparedDataset, describe_prepared
from post_training.data.prepared.mixture import TableBuilder
from post_training.data.prepared.prepare import SequenceWriter, write_rows
from post_training.data.prepared.sequences import cut_to_limit, make_batch
from post_training.data.reading import Verdicts
from post_training.data.rows import COMPLETION, PROMPT
from post_training.data.tokenize import TokenSequence

DATA = DataConfig(chat_template="chatml", datasets=[{"path": "x.jsonl"}])


def sequence(length: int, first: int = 0, weight: float | None = None) -> TokenSequence:
    """`length` tokens counting up from `first`, the second half of them trained."""
    kinds = np.full(length, PROMPT, np.uint8)
    kinds[length // 2 :] = COMPLETION
    weights = None if weight is None else np.full(length, weight, np.float32)
    return TokenSequence(np.arange(first, first + length, dtype=np.int32), kinds, weights)


def write(
    folder: Path,
    sequences: list[TokenSequence],
    *,
    batch_size: int = 3,
    data: DataConfig = DATA,
    **limits: object,
) -> PreparedDataset:
    settings = SequenceConfig(max_seq_length=16, **limits)
    folder.mkdir()
    builder = TableBuilder()
    with SequenceWriter(folder, np.dtype("<u2")) as writer:
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            pieces = [cut_to_limit(each.kinds, settings, "here") for each in part]
            made = make_batch(part, pieces, with_digests=data.deduplicate)
            writer.append(made)
            builder.add(0, made)
    verdicts = Verdicts("fail", folder / "rejects.jsonl")
    write_rows(
        folder,
        builder,
        verdicts,
        data,
        settings,
        0,
        sources=[{"name": "x"}],
        template=None,
        identity={},
    )
    return PreparedDataset.open(folder)


def test_prepared_gives_the_rows_back_in_order(tmp_path: Path):
    written = [sequence(2 + n % 9, first=n) for n in range(20)]
    dataset = write(tmp_path / "data", written)
    assert len(dataset) == 20
    for index, expected in enumerate(written):
        row = dataset.read(index)
        assert row.ids.tolist() == expected.ids.tolist()
        assert row.kinds.tolist() == expected.kinds.tolist()
        assert row.weights is None
        assert row.lengths == (len(expected.ids),)


@given(
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=40),
    packing=st.sampled_from(["bfd", "k_bin_packed", "next_fit"]),
)
def test_prepared_packed_rows_hold_every_sequence_once_and_whole(
    lengths: list[int], packing: str, tmp_path_factory: pytest.TempPathFactory
):
    written = [sequence(length, first=100 * n) for n, length in enumerate(lengths)]
    dataset = write(tmp_path_factory.mktemp("data") / "data", written, packing=packing)
    seen = []
    for index in range(len(dataset)):
        row = dataset.read(index)
        assert len(row.ids) == len(row.kinds) == sum(row.lengths) <= 16
        for ids, kinds in zip(
            np.split(row.ids, np.cumsum(row.lengths)[:-1]),
            np.split(row.kinds, np.cumsum(row.lengths)[:-1]),
            strict=True,
        ):
            seen.append((ids.tolist(), kinds.tolist()))
    assert sorted(seen) == sorted((s.ids.tolist(), s.kinds.tolist()) for s in written)


def test_prepared_weights_of_earlier_batches_are_one(tmp_path: Path):
    written = [sequence(4), sequence(5), sequence(6, weight=0.25), sequence(3)]
    dataset = write(tmp_path / "data", written, batch_size=1)
    assert dataset.has_weights
    assert [dataset.read(n).weights.tolist() for n in range(4)] == [
        [1] * 4,
        [1] * 5,
        [0.25] * 6,
        [1] * 3,
    ]


def test_prepared_bytes_do_not_depend_on_the_batches(tmp_path: Path):
    written = [sequence(2 + n % 9, first=n, weight=0.5 if n == 7 else None) for n in range(20)]
    for size in (1, 7, 20):
        write(tmp_path / str(size), written, batch_size=size, packing="bfd")
    first, *others = (hash_files(tmp_path / str(size)) for size in (1, 7, 20))
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("overlong", "lengths", "counted"),
    [("truncate", [16, 10], "num_truncated"), ("split", [16, 16, 8, 10], "num_split")],
)
def test_prepared_overlong_sequences_are_cut_and_counted(
    overlong: str, lengths: list[int], counted: str, tmp_path: Path
):
    kinds = np.full(40, COMPLETION, np.uint8)
    long = TokenSequence(np.arange(40, dtype=np.int32), kinds)
    dataset = write(tmp_path / "data", [long, sequence(10, first=500)], overlong=overlong)
    rows = [dataset.read(n) for n in range(len(dataset))]
    assert [len(row.ids) for row in rows] == lengths
    assert np.concatenate([row.ids for row in rows[:-1]]).tolist() == list(range(sum(lengths) - 10))
    assert dataset.record["counts"][counted] == 1
    # The first token of a piece is never predicted.
    trained = sum(length - 1 for length in lengths[:-1]) + 5
    assert dataset.record["counts"]["num_trained_tokens"] == trained


def test_prepared_duplicates_are_left_out_and_counted(tmp_path: Path):
    written = [sequence(4), sequence(5), sequence(4), sequence(4, weight=0.5)]
    data = DATA.model_copy(update={"deduplicate": True})
    dataset = write(tmp_path / "data", written, data=data)
    assert [len(dataset.read(n).ids) for n in range(len(dataset))] == [4, 5, 4]
    assert dataset.record["rejected"] == {"duplicate": 1}


def test_prepared_sequences_that_differ_in_what_is_trained_are_no_duplicates(tmp_path: Path):
    ids = np.arange(4, dtype=np.int32)
    written = [
        TokenSequence(ids, np.array([PROMPT] * prompt + [COMPLETION] * (4 - prompt), np.uint8))
        for prompt in (2, 3)
    ]
    data = DATA.model_copy(update={"deduplicate": True})
    dataset = write(tmp_path / "data", written, data=data)
    assert [dataset.read(n).kinds.tolist() for n in range(len(dataset))] == [
        each.kinds.tolist() for each in written
    ]


def test_prepared_weights_of_a_split_sequence_go_with_their_tokens(tmp_path: Path):
    weights = np.arange(1, 41, dtype=np.float32)
    long = TokenSequence(np.arange(40, dtype=np.int32), np.full(40, COMPLETION, np.uint8), weights)
    dataset = write(tmp_path / "data", [sequence(5), long], overlong="split")
    pieces = [dataset.read(n).weights for n in range(1, len(dataset))]
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    assert np.concatenate(pieces).tolist() == weights.tolist()


def test_prepared_longest_rows_first_under_debug_oom(tmp_path: Path):
    data = DATA.model_copy(update={"debug_oom": True})
    dataset = write(tmp_path / "data", [sequence(n) for n in (4, 9, 2, 9, 16)], data=data)
    assert [len(dataset.read(n).ids) for n in range(5)] == [16, 9, 9, 4, 2]


def test_prepared_folder_without_a_record_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="not a prepared dataset"):
        PreparedDataset.open(tmp_path)


def test_prepared_tells_how_many_rows_were_read_and_what_was_not(tmp_path: Path):
    record = write(tmp_path / "data", [sequence(4)] * 3).record
    assert next(describe_prepared(record)).startswith("x: 3 of 3 good rows, 12 tokens")
    columns = [{"name": "id", "read_as": None, "number": 5}]
    record["sources"][0] |= {"num_source_rows": 5, "columns": columns}
    lines = list(describe_prepared(record))
    assert lines[0].startswith("x: 3 of 3 good rows (5 were read), 12 tokens")
    assert lines[1] == "x: not read: id (5)"
