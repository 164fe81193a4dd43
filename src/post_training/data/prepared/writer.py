"""Writing a prepared dataset: its sequences as they come, then the rows and the record."""

from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from post_training.data.config import DataConfig, SequenceConfig
from post_training.data.indexed.writer import IndexedWriter
from post_training.data.prepared.dataset import (
    KINDS,
    OFFSETS,
    PIECES,
    SCHEMA,
    TOKENS,
    WEIGHTS,
    UsedTemplate,
    write_record,
)
from post_training.data.prepared.packing import utilisation
from post_training.data.prepared.row_plan import RowPlan, SequenceTable, TableBuilder, plan
from post_training.data.prepared.sequences import LENGTH, NUM_TRAINED, SEQUENCE, SequenceBatch
from post_training.data.verdicts import Verdicts


class SequenceWriter:
    """Appends sequences to a prepared folder; a context manager. dtype: of the ids."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self._tokens = IndexedWriter(folder / TOKENS, dtype)
        self._kinds = IndexedWriter(folder / KINDS, np.dtype(np.uint8))
        self._weights_path = folder / WEIGHTS
        self.num_tokens = 0

    def __enter__(self) -> "SequenceWriter":
        self._tokens.__enter__()
        self._kinds.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._tokens.__exit__(kind, error, trace)
        finally:
            self._kinds.__exit__(kind, error, trace)

    def append(self, batch: SequenceBatch) -> None:
        if batch.weights is not None or self._weights_path.exists():
            self._append_weights(batch)
        self._tokens.append(batch.ids, batch.lengths)
        self._kinds.append(batch.kinds, batch.lengths)
        self.num_tokens += len(batch.ids)

    def _append_weights(self, batch: SequenceBatch) -> None:
        weights = batch.weights
        if weights is None:
            weights = np.ones(len(batch.ids), np.float32)
        with open(self._weights_path, "ab") as file:
            if not file.tell():
                # The first weights that aren't 1: those of every token before them are.
                block = np.ones(1 << 20, "<f4").tobytes()
                for start in range(0, 4 * self.num_tokens, len(block)):
                    file.write(block[: 4 * self.num_tokens - start])
            file.write(weights.astype("<f4", copy=False).tobytes())


def write_rows(
    folder: Path,
    builder: TableBuilder,
    verdicts: Verdicts,
    data: DataConfig,
    limits: SequenceConfig,
    seed: int,
    *,
    sources: list[dict[str, Any]],
    template: UsedTemplate | None,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Decide the rows, write them and prepared.json, which is returned.

    sources: what to say of each, beside its figures. identity: what decides the bytes.
    Errors: PostTrainingError when no sequence is left, or too few for the mixture.
    """
    if not builder.num_pieces:
        raise verdicts.nothing_left("row")
    table = builder.table()
    rows = plan(table, data, limits, seed)
    if rows.num_duplicates:
        verdicts.count("duplicate", rows.num_duplicates)
    record = {
        "schema": SCHEMA,
        "identity": identity,
        "template": template and asdict(template),
        "rejected": verdicts.counts,
        "sources": [
            {**source, **_figures(table, rows, dataset)} for dataset, source in enumerate(sources)
        ],
        "counts": _counts(table, rows, limits),
    }
    np.save(folder / OFFSETS, rows.offsets)
    np.save(folder / PIECES, np.ascontiguousarray(rows.pieces[:, :3]))
    return write_record(folder, record)


def _counts(table: SequenceTable, rows: RowPlan, limits: SequenceConfig) -> dict[str, Any]:
    """Of the rows as they are trained on; a sequence that is used twice counts twice."""
    lengths = rows.pieces[:, LENGTH]
    num_rows, num_tokens = len(rows.offsets) - 1, int(lengths.sum())
    overlong = table.lengths[rows.sequences] > limits.max_seq_length
    return {
        "num_rows": num_rows,
        "num_sequences": len(rows.sequences),
        "num_tokens": num_tokens,
        "num_trained_tokens": int(rows.pieces[:, NUM_TRAINED].sum()),
        f"num_{'split' if limits.overlong == 'split' else 'truncated'}": int(overlong.sum()),
        "longest_row": int(np.add.reduceat(lengths, rows.offsets[:-1]).max()),
        "utilisation": round(utilisation(num_tokens, num_rows, limits.max_seq_length), 6),
    }


def _figures(table: SequenceTable, rows: RowPlan, dataset: int) -> dict[str, Any]:
    """Of one source. generation_ratio: completion tokens over prompt tokens (R_g in 2401.13586),
    null without any prompt."""
    own = table.dataset == dataset
    times = np.bincount(rows.sequences, minlength=len(own))[own]
    num_tokens = int((times * table.lengths[own]).sum())
    num_prompt = int((times * table.num_prompt_tokens[own]).sum())
    return {
        "num_rows": len(np.unique(table.pieces[own[table.pieces[:, SEQUENCE]], SEQUENCE])),
        "num_used": int(times.sum()),
        "num_tokens": num_tokens,
        "num_prompt_tokens": num_prompt,
        "generation_ratio": round(num_tokens / num_prompt - 1, 4) if num_prompt else None,
    }
