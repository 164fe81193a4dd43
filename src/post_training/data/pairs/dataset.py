"""A prepared dataset of pairs: token ids and figures on disk, and the rows that pairs make up.

    tokens.{bin,idx}   a document for each pair: what both answers begin with, then what each goes
                       on with, chosen first
    kinds.{bin,idx}    PROMPT, COMPLETION or EXCLUDED for each id
    pairs.npy          int64 [S, 5]: the lengths of those three parts, and more (encode.py)
    figures.npy        float64 [S, 2, 3]: of chosen and rejected (encode.py)
    row_offsets.npy    int64 [R + 1]: row r is row_pieces[row_offsets[r] : row_offsets[r + 1]]
    row_pieces.npy     int64 [N, 3]: the pair, 0, and its tokens as it lies in the row
    prepared.json      what it was made from, the chat template, the counts, and `references`:
                       what made the logprobs of each dataset, null where nothing says it

As a dataset of sequences (data/prepared/dataset.py) it holds no times and no paths.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from post_training.core.errors import UsageError
from post_training.core.files import atomic_directory, read_json
from post_training.data.config import PairConfig, SequenceConfig
from post_training.data.formats.columns import (
    ColumnReport,
    described_columns,
    described_source_rows,
)
from post_training.data.indexed import best_dtype
from post_training.data.pairs.encode import (
    CHOSEN,
    CUT,
    CUT_COMPLETION,
    CUT_PROMPT,
    PREFIX,
    REF_LOGPROB,
    REJECTED,
    SOURCE,
    PairEncoder,
    encode_pairs,
)
from post_training.data.prepared.dataset import (
    OFFSETS,
    PIECES,
    RECORD,
    PreparedRow,
    SequenceStore,
    UsedTemplate,
    own_store,
    write_record,
)
from post_training.data.prepared.mixture import RowPlan, TableBuilder, plan
from post_training.data.prepared.prepare import SequenceWriter
from post_training.data.prepared.sequences import LENGTH, NUM_TRAINED
from post_training.data.reading import Verdicts, counted, name_of, read_chunks
from post_training.data.sources import Source

PAIRS_SCHEMA = "post-training/pairs/1"
PAIRS, FIGURES = "pairs.npy", "figures.npy"


@dataclass(frozen=True)
class Pair:
    """number: in the dataset. source: index of its dataset. prefix: ids int32 [P] that both answers
    begin with, none of them trained. chosen, rejected: what each goes on with. figures: float64
    [2, 3]. is_cut: whether the limits cut something off."""

    number: int
    source: int
    prefix: np.ndarray
    chosen: PreparedRow
    rejected: PreparedRow
    figures: np.ndarray
    is_cut: bool


class PairDataset:
    """Rows of whole pairs, read one at a time."""

    def __init__(self, folder: Path, record: dict[str, Any], store: SequenceStore):
        self.folder = folder
        self.record = record
        self._store = store
        self._offsets = np.load(folder / OFFSETS)
        self._numbers = np.load(folder / PIECES, mmap_mode="r")[:, 0]
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
        return cls(folder, read_json(folder / RECORD, PAIRS_SCHEMA), own_store(folder))

    def __len__(self) -> int:
        return len(self._offsets) - 1

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

    def used_pairs(self) -> np.ndarray:
        """Numbers of the pairs that are in some row, ascending; int64."""
        return np.unique(self._numbers)

    def read(self, row: int) -> list[Pair]:
        numbers = self._numbers[self._offsets[row] : self._offsets[row + 1]]
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


def _split(sequence: PreparedRow, lengths: np.ndarray) -> Iterator[PreparedRow]:
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(sequence.ids, ends), np.split(sequence.kinds, ends), strict=True)
    for ids, kinds in parts:
        yield PreparedRow(ids, kinds, None, (len(ids),))


# From the sources to a prepared dataset of pairs; as data/prepared/prepare.py does for sequences.
#
# sources -> encode (workers) -> pairs on disk -> row_plan, a pair being one sequence -> rows


# Part of a prepared dataset's identity: to be raised when the same settings give other bytes.
PAIRS_VERSION = 2


def prepare_pairs(
    folder: Path,
    encoder: PairEncoder,
    sources: Sequence[Source],
    *,
    seed: int,
    identity: dict[str, Any],
    rejects_path: Path,
    on_progress: Callable[[int, int], None],
    check_inputs: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the dataset to `folder`, as a whole or not at all; its record.

    identity: what decides the bytes; kept in the record. Its `references` say what made the
    logprobs of each dataset, or null. check_inputs: as in data/prepared/prepare.py.
    Errors: PostTrainingError for a bad row under on_error: fail, and where no pair is left.
    """
    data, template = encoder.reader.config, encoder.encoder.template
    builder = TableBuilder()
    report = ColumnReport(encoder.reader.formats)
    pairs, figures = [], []
    with (
        atomic_directory(folder) as temporary,
        Verdicts(data.on_error, rejects_path) as verdicts,
    ):
        with SequenceWriter(temporary, best_dtype(encoder.num_ids)) as writer:
            for chunk in read_chunks(
                encode_pairs,
                encoder,
                sources,
                data,
                lambda dataset: builder.num_rows[dataset],
                report,
            ):
                for row in chunk.rejected:
                    verdicts.reject(row.place, row.bad, row.raw)
                writer.append(chunk.sequences)
                builder.add(chunk.dataset, chunk.sequences)
                pairs.append(chunk.pairs)
                figures.append(chunk.figures)
                on_progress(builder.num_sequences, writer.num_tokens)
            if not builder.num_pieces:
                raise verdicts.nothing_left("pair")
        check_inputs()
        table = builder.table()
        all_pairs, all_figures = np.concatenate(pairs), np.concatenate(figures)
        longest = encoder.limits.max_seq_length or int(table.pieces[:, LENGTH].max())
        limits = SequenceConfig(max_seq_length=longest, packing=encoder.limits.packing)
        rows = plan(table, data, limits, seed)
        if rows.num_duplicates:
            verdicts.count("duplicate", rows.num_duplicates)
        used, times = np.unique(rows.sequences, return_counts=True)
        record = {
            "schema": PAIRS_SCHEMA,
            "identity": identity,
            "template": asdict(UsedTemplate(template.name, template.text, template.end_of_turn)),
            "references": identity["references"],
            "rejected": verdicts.counts,
            "sources": [
                {
                    "name": name_of(dataset),
                    "read_as": found.describe(),
                    **report.record(index),
                    "num_pairs": int((all_pairs[:, SOURCE] == index).sum()),
                    "num_used": int(times[all_pairs[used, SOURCE] == index].sum()),
                }
                for index, (dataset, found) in enumerate(
                    zip(data.datasets, encoder.reader.formats, strict=True)
                )
            ],
            "counts": _counts(rows, all_pairs, all_figures, encoder.limits),
        }
        np.save(temporary / PAIRS, all_pairs)
        np.save(temporary / FIGURES, all_figures)
        np.save(temporary / OFFSETS, rows.offsets)
        np.save(temporary / PIECES, np.ascontiguousarray(rows.pieces[:, :3]))
        return write_record(temporary, record)


def _counts(
    rows: RowPlan, pairs: np.ndarray, figures: np.ndarray, limits: PairConfig
) -> dict[str, Any]:
    """Of the rows as they are trained on; a pair that is used twice counts twice. num_sequences:
    pairs. num_tokens: as they lie in the rows. longest_sequence: a prompt with its answer."""
    used = pairs[rows.sequences]
    lengths = rows.pieces[:, LENGTH]
    answers = used[:, [PREFIX]] + used[:, [CHOSEN, REJECTED]]
    known = ~np.isnan(figures[rows.sequences, :, REF_LOGPROB]).any(1)
    totals = np.add.reduceat(lengths, rows.offsets[:-1])
    capacity = limits.max_seq_length or int(totals.max())
    return {
        "num_rows": len(rows.offsets) - 1,
        "num_sequences": len(used),
        "num_tokens": int(lengths.sum()),
        "num_trained_tokens": int(rows.pieces[:, NUM_TRAINED].sum()),
        "num_truncated_prompts": int(((used[:, CUT] & CUT_PROMPT) != 0).sum()),
        "num_truncated_completions": int(((used[:, CUT] & CUT_COMPLETION) != 0).sum()),
        "num_with_reference": int(known.sum()),
        "longest_row": int(totals.max()),
        "longest_sequence": int(answers.max()),
        "utilisation": round(float(lengths.sum() / (len(totals) * capacity)), 6),
    }


def described_pairs(record: dict[str, Any]) -> Iterator[str]:
    """The record's figures, in a few lines for a person."""
    counts, rejected = record["counts"], record["rejected"]
    for source in record["sources"]:
        good = f"{source['num_used']:,} of {source['num_pairs']:,} good pairs"
        yield f"{source['name']}: {good}{described_source_rows(source, source['num_pairs'])}"
        yield from described_columns(source)
    if rejected:
        yield f"left out: {counted(rejected)}"
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
