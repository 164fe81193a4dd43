"""Counts of prepared data against naive ones, and against those in its record."""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.data import lengths
from post_training.data.config import DataConfig, SequenceConfig
from post_training.data.indexed import IndexedWriter
from post_training.data.lengths import (
    Bin,
    build_piece_table,
    histogram,
    histogram_lines,
    summarise_lengths,
    table_lines,
    write_per_sample,
)
from post_training.data.prepared.dataset import PreparedDataset, SequenceStore
from post_training.data.prepared.mixture import TableBuilder
from post_training.data.prepared.prepare import SequenceWriter, write_rows
from post_training.data.prepared.sequences import cut_to_limit, make_batch
from post_training.data.reading import Verdicts
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT
from post_training.data.tokenize import TokenSequence

KINDS = (PROMPT, COMPLETION, EXCLUDED)
NAMES = ["a", "b"]
# With something to train within the first 8 tokens, as a sequence in use always has.
sequences_of_kinds = st.lists(
    st.lists(st.sampled_from(KINDS), min_size=2, max_size=20).filter(
        lambda kinds: COMPLETION in kinds[1:8]
    ),
    min_size=1,
    max_size=12,
)


def prepare(folder: Path, sources: list[list[list[int]]], **settings: object) -> PreparedDataset:
    """sources: by source, the kinds of each sequence."""
    data = DataConfig(
        chat_template="chatml",
        datasets=[{"path": name, **settings} for name in NAMES[: len(sources)]],
    )
    limits = SequenceConfig(max_seq_length=8, packing="bfd", overlong="split")
    folder.mkdir()
    builder = TableBuilder()
    with SequenceWriter(folder, np.dtype("<u2")) as writer:
        for source, own in enumerate(sources):
            made = [
                TokenSequence(np.arange(len(k), dtype=np.int32), np.array(k, np.uint8)) for k in own
            ]
            made = make_batch(
                made,
                [cut_to_limit(each.kinds, limits, "here") for each in made],
                with_digests=False,
            )
            writer.append(made)
            builder.add(source, made)
    write_rows(
        folder,
        builder,
        Verdicts("fail", folder / "rejects.jsonl"),
        data,
        limits,
        0,
        sources=[{"name": name} for name in NAMES[: len(sources)]],
        template=None,
        identity={},
    )
    return PreparedDataset.open(folder)


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("data") / "data"


@given(sources=st.lists(sequences_of_kinds, min_size=2, max_size=2))
def test_piece_table_equals_counting_one_by_one(
    sources: list[list[list[int]]], new_folder: Callable[[], Path]
):
    dataset = prepare(new_folder(), sources)
    table = build_piece_table(dataset)
    everything = [
        (source, n, kinds) for source in (0, 1) for n, kinds in enumerate(sources[source])
    ]
    expected = []
    for row in range(len(dataset)):
        for number, start, length in dataset.pieces[
            dataset.offsets[row] : dataset.offsets[row + 1]
        ].tolist():
            source, sequence, kinds = everything[number]
            trained = kinds[start + 1 : start + length].count(COMPLETION)
            prompt = kinds.index(COMPLETION)
            expected.append((row, source, sequence, length, trained, len(kinds), prompt))
    columns = (
        *(table.row, table.source, table.sequence, table.num_tokens, table.num_trained),
        *(table.length, table.num_prompt),
    )
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


@given(
    sources=st.lists(sequences_of_kinds, min_size=1, max_size=2), times=st.sampled_from([1, 2, 3])
)
def test_figures_equal_those_of_the_record(
    sources: list[list[list[int]]], times: int, new_folder: Callable[[], Path]
):
    dataset = prepare(new_folder(), sources, duplication_factor=float(times))
    by_source = summarise_lengths(build_piece_table(dataset), NAMES)
    counts = dataset.record["counts"]
    assert by_source[-1].num_tokens == counts["num_tokens"]
    assert by_source[-1].num_trained_tokens == counts["num_trained_tokens"]
    for found, recorded in zip(by_source, dataset.record["sources"], strict=False):
        assert found.name == recorded["name"]
        assert found.num_sequences == recorded["num_used"]
        assert found.generation_ratio == recorded["generation_ratio"]


def test_figures_are_the_same_however_many_tokens_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources = [[[0] * (n % 7) + [1] * 3 for n in range(50)], [[0, 1]] * 30]
    dataset = prepare(tmp_path / "data", sources)
    expected = summarise_lengths(build_piece_table(dataset), NAMES)
    monkeypatch.setattr(lengths, "_TOKENS_AT_ONCE", 11)
    assert summarise_lengths(build_piece_table(dataset), NAMES) == expected


def indexed(folder: Path, sizes: list[int], kinds: list[int] | None) -> SequenceStore:
    with IndexedWriter(folder / "tokens", np.int32) as tokens:
        tokens.append(np.arange(sum(sizes), dtype=np.int32), np.array(sizes))
    if kinds is not None:
        with IndexedWriter(folder / "kinds", np.uint8) as file:
            file.append(np.array(kinds, np.uint8), np.array(sizes))
    return SequenceStore(folder / "tokens", None if kinds is None else folder / "kinds")


def test_figures_of_several_indexed_datasets_with_and_without_kinds(tmp_path: Path):
    stores = []
    for name, sizes, kinds in (("a", [3, 0, 4], [0, 1, 1, 2, 0, 0, 2]), ("b", [5], None)):
        (tmp_path / name).mkdir()
        stores.append(indexed(tmp_path / name, sizes, kinds))
    pieces = np.array([[0, 0, 3], [1, 0, 0], [2, 0, 4], [3, 0, 5]])
    # In the record of indexed datasets only those in use are counted.
    record = {"sources": [{"name": "a", "num_rows": 1}, {"name": "b", "num_rows": 1}]}
    dataset = PreparedDataset(stores, np.arange(5), pieces, record)
    a, b, both = summarise_lengths(build_piece_table(dataset), NAMES)
    assert (a.num_sequences, a.num_tokens, a.num_trained_tokens) == (3, 7, 2)
    assert (a.mean, a.median, a.longest) == (2.3, 3, 4)
    assert a.generation_ratio == 0.4  # 7 tokens, 5 of them before an answer
    assert (b.num_tokens, b.num_trained_tokens, b.generation_ratio) == (5, 4, None)
    assert (both.name, both.num_tokens) == ("all", 12)


@given(sizes=st.lists(st.integers(0, 1 << 20), min_size=1))
def test_histogram_bins_hold_every_length_once(sizes: list[int]):
    bins = histogram(np.array(sizes))
    for each in bins:
        assert each.num_sequences == sum(each.start <= size < each.end for size in sizes)
    assert sum(each.num_sequences for each in bins) == len(sizes)
    assert all(one.end == other.start for one, other in pairwise(bins))
    assert bins[0].num_sequences
    assert bins[-1].num_sequences


def test_histogram_has_two_bins_for_each_doubling():
    edges = [each.start for each in histogram(np.array([16, 1000]))]
    assert edges == [16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724]


def test_histogram_lines_bars_are_in_proportion():
    *_, long, half, tiny, none = histogram_lines(
        [Bin(8, 11, 1000), Bin(11, 16, 500), Bin(16, 23, 1), Bin(23, 32, 0)], "sequences"
    )
    assert long == " 8 to 10  1,000  " + "█" * 40
    assert half == "11 to 15    500  " + "█" * 20
    assert tiny == "16 to 22      1  ▏"
    assert none == "23 to 31      0"


def test_table_lines_are_aligned(tmp_path: Path):
    dataset = prepare(tmp_path / "data", [[[0, 1]] * 1200, [[1, 1, 1]]])
    title, *lines = table_lines(summarise_lengths(build_piece_table(dataset), NAMES))
    assert len({len(line) for line in (title, *lines)}) == 1
    assert lines[0].split() == ["a", "1,200", "2,400", "1,200", "2.0", *["2"] * 4, "1.000"]
    assert lines[1].split() == ["b", "1", "3", "2", "3.0", *["3"] * 4, "-"]
    assert [line.split()[0] for line in lines] == ["a", "b", "all"]


def test_per_sample_lines_add_up(tmp_path: Path):
    dataset = prepare(tmp_path / "data", [[[0, 1, 1], [0] * 3 + [1] * 9], [[0, 1]]])
    file = io.StringIO()
    write_per_sample(build_piece_table(dataset), NAMES, file)
    title, *lines = (line.split("\t") for line in file.getvalue().splitlines())
    assert title == ["row", "source", "sequence", "length", "tokens", "trained"]
    # The second sequence is split at 8.
    assert sorted(line[1:] for line in lines) == [
        ["a", "1", "3", "3", "2"],
        ["a", "2", "12", "4", "3"],
        ["a", "2", "12", "8", "5"],
        ["b", "1", "2", "2", "1"],
    ]
    assert {line[0] for line in lines} == {str(row + 1) for row in range(len(dataset))}
