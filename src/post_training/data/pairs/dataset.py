"""A prepared dataset of pairs: token ids and figures on disk, and the rows that pairs make up.

    tokens.{bin,idx}   a document for each pair: what both answers begin with, then what each goes
                       on with, chosen first
    kinds.{bin,idx}    PROMPT, COMPLETION or EXCLUDED for each id
    pairs.npy          int64 [S, 5]: the columns PREFIX to SOURCE
    figures.npy        float64 [S, 2, 3]: of chosen and rejected, the columns REF_LOGPROB to
                       NUM_REF_REWARDS
    row_offsets.npy    int64 [R + 1]: row r is row_pieces[row_offsets[r] : row_offsets[r + 1]]
    row_pieces.npy     int64 [N, 3]: the pair, 0, and its tokens as it lies in the row
    prepared.json      what it was made from, the chat template, the counts, and `references`:
                       what made the logprobs of each dataset, null where nothing says it

As a dataset of sequences (data/prepared/dataset.py) it holds no times and no paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64

from post_training.core.errors import UsageError
from post_training.core.files import read_json
from post_training.data.formats.columns import describe_columns, describe_source_rows
from post_training.data.prepared.dataset import (
    OFFSETS,
    PIECES,
    RECORD,
    PreparedRow,
    SequenceStore,
    UsedTemplate,
    open_own_store,
)
from post_training.data.reading import describe_counts

PAIRS_SCHEMA = "post-training/pairs/1"
PAIRS, FIGURES = "pairs.npy", "figures.npy"
# Columns of pairs.npy: how many tokens both answers begin with, how many each goes on with, what
# the limits cut off (bits), and the number of the dataset.
PREFIX, CHOSEN, REJECTED, CUT, SOURCE = range(5)
CUT_PROMPT, CUT_COMPLETION = 1, 2
# Columns of an answer in figures.npy; NaN where a figure isn't known. REF_LOGPROB: in nats, of the
# whole answer. QUANTILE: the share of the reference's rewards that are at most this answer's.
REF_LOGPROB, QUANTILE, NUM_REF_REWARDS = range(3)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    number: in the dataset. source: index of its dataset. prefix: the ids that both answers
    begin with, none of them trained. chosen, rejected: what each goes on with. figures: of chosen
    and rejected. is_cut: whether the limits cut something off.
    """

    number: int
    source: int
    prefix: Int32[np.ndarray, " prefix"]
    chosen: PreparedRow
    rejected: PreparedRow
    figures: Float64[np.ndarray, "2 3"]
    is_cut: bool


class PairDataset:
    """Rows of whole pairs, read one at a time."""

    def __init__(self, folder: Path, record: dict[str, Any], store: SequenceStore):
        self.folder = folder
        self.record = record
        self._store = store
        self.offsets = np.load(folder / OFFSETS)
        self._pieces = np.load(folder / PIECES, mmap_mode="r")
        self.pairs = np.load(folder / PAIRS, mmap_mode="r")
        self.figures = np.load(folder / FIGURES, mmap_mode="r")

    @classmethod
    def open(cls, folder: Path) -> "PairDataset":
        """Errors: UsageError for what is no prepared dataset of pairs."""
        if not (folder / RECORD).exists():
            raise UsageError(
                f"not a prepared dataset: it has no {RECORD}",
                where=str(folder),
                hint="give the RUN/dataset folder of `entrypoint prepare` with a dpo block",
            )
        return cls(folder, read_json(folder / RECORD, PAIRS_SCHEMA), open_own_store(folder))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_pairs(self) -> int:
        """All that are on disk; each is in some row, or in several, or in none."""
        return len(self.pairs)

    @property
    def template(self) -> UsedTemplate:
        return UsedTemplate(**self.record["template"])

    @property
    def source_names(self) -> list[str]:
        return [source["name"] for source in self.record["sources"]]

    @property
    def numbers(self) -> Int64[np.ndarray, " N"]:
        """Of the pairs, row by row: those of row r are numbers[offsets[r] : offsets[r + 1]]."""
        return np.asarray(self._pieces[:, 0])

    @property
    def lengths_in_rows(self) -> Int64[np.ndarray, " N"]:
        """Tokens of each pair as it lies in its row, as length_in_row."""
        return np.asarray(self._pieces[:, 2])

    def used_pairs(self) -> Int64[np.ndarray, " used"]:
        """Numbers of the pairs that are in some row, ascending."""
        return np.unique(self.numbers)

    def read(self, row: int) -> list[Pair]:
        """The pairs of a row, in order."""
        numbers = self._pieces[self.offsets[row] : self.offsets[row + 1], 0]
        return [self.read_pair(number) for number in numbers.tolist()]

    def read_pair(self, number: int) -> Pair:
        entry = self.pairs[number]
        lengths = entry[[PREFIX, CHOSEN, REJECTED]]
        sequence = self._store.read(number, 0, int(lengths.sum()))
        prefix, *answers = _split(sequence, lengths)
        chosen, rejected = answers
        is_cut, source = bool(entry[CUT]), int(entry[SOURCE])
        return Pair(
            number, source, prefix.ids, chosen, rejected, np.array(self.figures[number]), is_cut
        )


def _split(sequence: PreparedRow, lengths: Int64[np.ndarray, "3"]) -> Iterator[PreparedRow]:
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(sequence.ids, ends), np.split(sequence.kinds, ends), strict=True)
    for ids, kinds in parts:
        yield PreparedRow(ids, kinds, None, (len(ids),))


def length_in_row(pair: Int64[np.ndarray, "5"], *, share_prompt: bool) -> int:
    """Tokens of a pair as it is laid out in a row (train/dpo_loss.py).

    With a shared prompt its last token is there once more for each answer, to predict its first.
    """
    prefix, answers = int(pair[PREFIX]), int(pair[CHOSEN] + pair[REJECTED])
    return answers + (prefix + 1 if share_prompt and prefix else 2 * prefix)


def describe_pairs(record: dict[str, Any]) -> Iterator[str]:
    """The counts of prepared.json, in a few lines for a person."""
    counts, rejected = record["counts"], record["rejected"]
    for source in record["sources"]:
        good = f"{source['num_used']:,} of {source['num_pairs']:,} good pairs"
        yield f"{source['name']}: {good}{describe_source_rows(source, source['num_pairs'])}"
        yield from describe_columns(source)
    if rejected:
        yield f"left out: {describe_counts(rejected)}"
    yield (
        f"{counts['num_rows']:,} rows of {counts['num_sequences']:,} pairs, "
        f"{counts['num_tokens']:,} tokens, {counts['num_trained_tokens']:,} of them trained"
    )
    yield (
        f"cut off: {counts['num_truncated_prompts']:,} prompts, "
        f"{counts['num_truncated_completions']:,} answers; reference logprobs of "
        f"{counts['num_with_reference']:,} pairs; the longest sequence has "
        f"{counts['longest_sequence']:,} tokens"
    )
