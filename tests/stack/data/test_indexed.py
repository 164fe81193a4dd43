"""Pairs of .bin and .idx: against megatron-core, and back and forth."""

import pickle
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets import indexed_dataset as megatron

from post_training.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    best_dtype,
    data_path,
    index_path,
    open_kinds,
)

# Documents of one and of several sequences, with ids that only fit 16 bits unsigned.
DOCUMENTS = [[[1, 2, 3]], [[65_499], [4, 5]], [[6, 7, 8, 9]], [[10], [11], [12, 13]]]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> Path:
    sequences = [sequence for document in documents for sequence in document]
    with IndexedWriter(prefix, dtype) as writer:
        writer.append(
            np.array([token for sequence in sequences for token in sequence], np.int64),
            np.array([len(sequence) for sequence in sequences]),
            np.array([len(document) for document in documents]),
        )
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "chat.v1_text_document", DOCUMENTS)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int64"])
def test_indexed_files_are_those_of_megatron(dtype: str, tmp_path: Path):
    largest = np.iinfo(dtype).max
    documents = [[[min(t, largest) for t in s] for s in document] for document in DOCUMENTS]
    ours, theirs = write(tmp_path / "ours", documents, dtype), tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=getattr(np, dtype))
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in document])
    builder.finalize(f"{theirs}.idx")
    assert index_path(ours).read_bytes() == index_path(theirs).read_bytes()
    assert data_path(ours).read_bytes() == data_path(theirs).read_bytes()

    read_by_them = megatron.IndexedDataset(str(ours))
    read_by_us = IndexedDataset(theirs)
    sequences = [sequence for document in documents for sequence in document]
    assert [read_by_them[i].tolist() for i in range(len(read_by_them))] == sequences
    assert [read_by_us.read(i).tolist() for i in range(len(read_by_us))] == sequences
    assert read_by_them.document_indices.tolist() == read_by_us.documents.tolist()


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 131_072])
def test_indexed_dtype_is_the_one_megatron_chooses(vocab_size: int):
    assert best_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


documents_of_ids = st.lists(
    st.lists(st.lists(st.integers(0, 65_535), max_size=5), min_size=1, max_size=4),
    min_size=1,
    max_size=8,
)


@given(documents_of_ids, st.integers(0, 8), st.sampled_from(["uint16", "int32"]))
def test_indexed_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents, cut: int, dtype: str
):
    prefix = tmp_path_factory.mktemp("round") / "trip"
    sequences = [sequence for document in documents for sequence in document]
    with IndexedWriter(prefix, dtype) as writer:
        for part in (documents[:cut], documents[cut:]):
            part_sequences = [sequence for document in part for sequence in document]
            writer.append(
                np.array(list(chain(*part_sequences)), np.int64),
                np.array([len(sequence) for sequence in part_sequences], np.int64),
                np.array([len(document) for document in part], np.int64),
            )
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == dtype
    assert dataset.num_tokens == sum(map(len, sequences))
    assert [dataset.read(i).tolist() for i in range(len(dataset))] == sequences
    assert dataset.lengths.tolist() == [len(sequence) for sequence in sequences]
    starts = dataset.documents.tolist()
    assert [sequences[a:b] for a, b in pairwise(starts)] == documents


@given(st.lists(st.integers(0, 6), max_size=12))
def test_indexed_read_many_equals_read(tmp_path_factory: pytest.TempPathFactory, indices):
    prefix = tmp_path_factory.mktemp("many") / "chat"
    dataset = IndexedDataset(write(prefix, DOCUMENTS))
    assert [a.tolist() for a in dataset.read_many(indices)] == [
        dataset.read(index).tolist() for index in indices
    ]


@pytest.mark.parametrize("index", [-1, 7])
def test_indexed_sequence_that_is_not_there_is_an_error(prefix: Path, index: int):
    with pytest.raises(IndexError, match=f"index {index} is out of bounds"):
        IndexedDataset(prefix).read(index)


@pytest.mark.parametrize(
    ("start", "length", "expected"), [(0, 2, [6, 7]), (1, 3, [7, 8, 9]), (4, 0, [])]
)
def test_indexed_part_of_a_sequence_is_read(
    prefix: Path, start: int, length: int, expected: list[int]
):
    assert IndexedDataset(prefix).read(3, start, length).tolist() == expected


@pytest.mark.parametrize(("start", "length"), [(2, 3), (-1, 1), (5, None)])
def test_indexed_part_beyond_the_sequence_is_an_error(prefix: Path, start: int, length: int | None):
    with pytest.raises(IndexError, match="of 4 in sequence 3"):
        IndexedDataset(prefix).read(3, start, length)


def test_indexed_dataset_pickled_reads_the_same(prefix: Path):
    dataset = pickle.loads(pickle.dumps(IndexedDataset(prefix)))
    assert dataset.read(6).tolist() == [12, 13]


def test_indexed_error_while_writing_leaves_the_older_pair(prefix: Path):
    before = index_path(prefix).read_bytes(), data_path(prefix).read_bytes()
    with pytest.raises(KeyboardInterrupt), IndexedWriter(prefix, "int32") as writer:
        writer.append(np.array([1]), np.array([1]))
        raise KeyboardInterrupt
    assert (index_path(prefix).read_bytes(), data_path(prefix).read_bytes()) == before
    assert len(list(prefix.parent.iterdir())) == 2


def test_indexed_pair_over_an_older_one_is_the_new_one(prefix: Path):
    write(prefix, [[[9]]], "int32")
    assert IndexedDataset(prefix).read_many(range(1))[0].tolist() == [9]


def test_indexed_kinds_are_of_the_same_sequences(prefix: Path):
    kinds = write(
        prefix.with_name("chat.v1_kinds_document"),
        [[[0 for _ in sequence] for sequence in document] for document in DOCUMENTS],
        "uint8",
    )
    assert open_kinds(kinds, IndexedDataset(prefix)).read(0).tolist() == [0, 0, 0]


PEAK = """
import resource, sys
from pathlib import Path
from post_training.data.indexed import IndexedDataset
dataset = IndexedDataset(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(int(dataset.read(index)[-1]) for index in range(len(dataset)))
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_indexed_reading_all_tokens_takes_no_more_memory(tmp_path: Path):
    num_sequences, length = 64, 2**19  # 64 MiB
    with IndexedWriter(tmp_path / "long", "uint16") as writer:
        for _ in range(num_sequences):
            writer.append(np.ones(length, np.uint16), np.array([length]))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "long"], capture_output=True, text=True, check=True
    )
    total, grown_kib = map(int, done.stdout.split())
    assert total == num_sequences
    assert grown_kib < 8 * 1024
