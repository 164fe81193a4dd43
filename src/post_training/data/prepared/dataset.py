"""A prepared dataset: token sequences on disk, and the rows that they make up.

    tokens.{bin,idx}   the ids, in Megatron's format, a document for each row of the sources
    kinds.{bin,idx}    PROMPT, COMPLETION or EXCLUDED for each id
    weights.f32        the weight of each id in the loss; only there when some differ from 1
    row_offsets.npy    int64 [R + 1]: row r is row_pieces[row_offsets[r] : row_offsets[r + 1]]
    row_pieces.npy     int64 [N, 3]: sequence, first token, number of tokens
    prepared.json      what it was made from, the chat template, the counts, and the sha256 of the
                       files above

The same settings and sources give the same bytes: no times, no paths. It is read from disk, row by
row, so its size is bounded by the disk alone. Rows over .bin/.idx files that are elsewhere have
only the rows and prepared.json.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from post_training.core.errors import UsageError
from post_training.core.files import read_json, write_json
from post_training.core.hashing import hash_files, known_sha256
from post_training.data.formats.columns import describe_columns, describe_source_rows
from post_training.data.indexed import IndexedDataset, open_kinds
from post_training.data.reading import describe_counts
from post_training.data.rows import COMPLETION

SCHEMA = "post-training/prepared/1"
RECORD = "prepared.json"
TOKENS, KINDS, WEIGHTS = "tokens", "kinds", "weights.f32"
OFFSETS, PIECES = "row_offsets.npy", "row_pieces.npy"


def write_record(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write prepared.json, a dataset's last file; the record, with the digests of the others."""
    record = {**record, "files": hash_files(folder)}
    write_json(folder / RECORD, record)
    return record


def check_files(folder: Path, schema: str = SCHEMA) -> None:
    """Check that a dataset which was made before, here or by another run, is what was written.

    schema: of its prepared.json; pairs have their own.
    Errors: UsageError that names the first file which is not.
    """
    written = read_json(folder / RECORD, schema).get("files", {})
    found = hash_files(folder, known_sha256)
    found.pop(RECORD, None)
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            raise UsageError(
                "is not what was prepared: it was changed, added or taken away since",
                where=str(folder / name),
                hint=f"remove {folder}: it is made anew",
            )


@dataclass(frozen=True)
class PreparedRow:
    """A row of one or several pieces, one after another.

    weights: None when each is 1. lengths: of the pieces, in tokens; their sum is T.
    """

    ids: Int32[np.ndarray, " T"]
    kinds: UInt8[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"] | None
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class UsedTemplate:
    """What the rows were rendered with. text: Jinja. end_of_turn: what the model says when done."""

    name: str
    text: str
    end_of_turn: str


class SequenceStore:
    """Sequences on disk: ids and kinds from two pairs of .bin/.idx files, and their weights.

    kinds: None when every token is COMPLETION.
    """

    def __init__(self, tokens: Path, kinds: Path | None, weights: Path | None = None):
        self.tokens = IndexedDataset(tokens)
        self.kinds = None if kinds is None else open_kinds(kinds, self.tokens)
        self.weights = weights if weights is not None and weights.exists() else None

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, index: int, start: int, length: int) -> PreparedRow:
        """A piece of sequence `index`: `length` tokens from `start`."""
        ids = self.tokens.read(index, start, length).astype(np.int32, copy=False)
        if self.kinds is None:
            kinds = np.full(length, COMPLETION, np.uint8)
        else:
            kinds = self.kinds.read(index, start, length)
        return PreparedRow(ids, kinds, self._read_weights(index, start, length), (length,))

    def _read_weights(
        self, index: int, start: int, length: int
    ) -> Float32[np.ndarray, " T"] | None:
        if self.weights is None:
            return None
        offset = 4 * (self.tokens.token_offset(index) + start)
        with open(self.weights, "rb") as file:
            return np.frombuffer(os.pread(file.fileno(), 4 * length, offset), "<f4")


class PreparedDataset:
    """Rows, read one at a time. stores: their sequences are numbered through all of them."""

    def __init__(
        self,
        stores: Sequence[SequenceStore],
        offsets: Int64[np.ndarray, " bounds"],
        pieces: Int64[np.ndarray, "pieces 3"],
        record: dict[str, Any],
    ):
        self.stores = stores
        self.offsets = offsets
        self.pieces = pieces
        self.record = record
        self._first = np.cumsum([0, *(len(store) for store in stores)])

    @classmethod
    def open(cls, folder: Path, stores: Sequence[SequenceStore] = ()) -> "PreparedDataset":
        """stores: where the folder has only the rows.

        Errors: UsageError for what is no prepared dataset.
        """
        if not (folder / RECORD).exists():
            raise UsageError(
                f"not a prepared dataset: it has no {RECORD}",
                where=str(folder),
                hint="give the RUN/dataset folder of `entrypoint prepare`",
            )
        record = read_json(folder / RECORD, SCHEMA)
        # Mapped, not read: the pieces of a million rows are 24 MB, in each process of a node.
        pieces = np.load(folder / PIECES, mmap_mode="r")
        return cls(stores or [open_own_store(folder)], np.load(folder / OFFSETS), pieces, record)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def template(self) -> UsedTemplate | None:
        """None where the rows were tokens to begin with."""
        settings = self.record["template"]
        return settings and UsedTemplate(**settings)

    @property
    def has_weights(self) -> bool:
        return any(store.weights is not None for store in self.stores)

    def read(self, row: int) -> PreparedRow:
        """The pieces of a row as one. Weights are there where any piece has some."""
        pieces = self.pieces[self.offsets[row] : self.offsets[row + 1]].tolist()
        parts = [self._read_piece(*piece) for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        weights = None
        if any(part.weights is not None for part in parts):
            weights = np.concatenate(
                [np.ones(len(p.ids), np.float32) if p.weights is None else p.weights for p in parts]
            )
        return PreparedRow(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.kinds for part in parts]),
            weights,
            tuple(len(part.ids) for part in parts),
        )

    def _read_piece(self, sequence: int, start: int, length: int) -> PreparedRow:
        store = int(np.searchsorted(self._first, sequence, side="right")) - 1
        return self.stores[store].read(sequence - int(self._first[store]), start, length)


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """The counts of prepared.json as metrics of a run."""
    rejected = {f"num_rejected_{name}": number for name, number in record["rejected"].items()}
    return {**record["counts"], **rejected}


def describe_prepared(record: dict[str, Any]) -> Iterator[str]:
    """The counts of prepared.json, in a few lines for a person."""
    counts, rejected = record["counts"], record["rejected"]
    for source in record["sources"]:
        ratio = source["generation_ratio"]
        yield (
            f"{source['name']}: {source['num_used']:,} of {source['num_rows']:,} good rows"
            f"{describe_source_rows(source, source['num_rows'])}, "
            f"{source['num_tokens']:,} tokens"
            f"{'' if ratio is None else f', {ratio} completion tokens for a prompt token'}"
        )
        yield from describe_columns(source)
        yield from _describe_history(source)
    if rejected:
        yield f"left out: {describe_counts(rejected)}"
    yield (
        f"{counts['num_rows']:,} rows of {counts['num_sequences']:,} sequences, "
        f"{counts['num_tokens']:,} tokens, {counts['num_trained_tokens']:,} of them trained"
    )
    overlong = "split" if "num_split" in counts else "truncated"
    yield (
        f"{counts[f'num_{overlong}']:,} {overlong}; the longest row has {counts['longest_row']:,} "
        f"tokens; rows are {counts['utilisation']:.1%} full"
    )


def _describe_history(source: dict[str, Any]) -> Iterator[str]:
    """What the template did to earlier turns of the rows."""
    history = source.get("history", {})
    if "num_rows_in_several" in history:
        yield (
            f"{source['name']}: {history['num_rows_in_several']:,} conversations became "
            f"{history['num_sequences_of_them']:,} sequences, since the template writes earlier "
            "turns otherwise than they were said (history_thoughts)"
        )
    if "num_thoughts_left_out" in history:
        yield (
            f"{source['name']}: {history['num_thoughts_left_out']:,} thoughts of earlier turns are "
            "left out of what follows them, as a server will (history_thoughts)"
        )


def open_own_store(folder: Path) -> SequenceStore:
    """The sequences in the prepared folder itself."""
    return SequenceStore(folder / TOKENS, folder / KINDS, folder / WEIGHTS)
