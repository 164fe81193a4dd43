"""From the sources to a prepared dataset of pairs; as data/prepared/prepare.py does for sequences.

sources -> encode (workers) -> pairs on disk -> row_plan, a pair being one sequence -> rows
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from post_training.core.files import atomic_directory
from post_training.data.column_report import (
    ColumnReport,
    described_columns,
    described_source_rows,
)
from post_training.data.config import PairConfig, SequenceConfig
from post_training.data.indexed.writer import best_dtype
from post_training.data.pairs.dataset import FIGURES, PAIRS, SCHEMA
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
from post_training.data.prepared.dataset import OFFSETS, PIECES, UsedTemplate, write_record
from post_training.data.prepared.row_plan import RowPlan, TableBuilder, plan
from post_training.data.prepared.sequences import LENGTH, NUM_TRAINED
from post_training.data.prepared.writer import SequenceWriter
from post_training.data.reading import name_of, read_chunks
from post_training.data.sources import Source
from post_training.data.verdicts import Verdicts, counted

# Part of a prepared dataset's identity: to be raised when the same settings give other bytes.
VERSION = 2


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
            "schema": SCHEMA,
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


def described(record: dict[str, Any]) -> Iterator[str]:
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
