"""Rows over indexed datasets (.bin/.idx) that stay where they are: what prepare.py makes of text,
made of tokens. Only the rows and their record are written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory
from post_training.data.config import DataConfig, SequenceConfig
from post_training.data.indexed.dataset import KINDS, TEXT, data_path
from post_training.data.prepared.dataset import SequenceStore
from post_training.data.prepared.row_plan import TableBuilder
from post_training.data.prepared.sequences import SequenceBatch, batch, cut
from post_training.data.prepared.writer import write_rows
from post_training.data.rows import BadRow, Place
from post_training.data.tokenize import Sequence
from post_training.data.verdicts import Verdicts

_SEQUENCES_AT_ONCE = 1000


def open_stores(data: DataConfig) -> list[SequenceStore]:
    """PREFIX_text_document of each prefix in `data.indexed`, and PREFIX_kinds_document beside it.

    Errors: PostTrainingError for files that are no pair; UsageError for a missing mask.
    """
    return [_open(prefix, data.without_kinds == "train_all") for prefix in data.indexed]


def _open(prefix: Path, train_all: bool) -> SequenceStore:
    text, kinds = (prefix.with_name(prefix.name + ending) for ending in (TEXT, KINDS))
    if data_path(kinds).exists():
        return SequenceStore(text, kinds)
    if not train_all:
        raise UsageError(
            "no such file, so nothing says which tokens are to be trained",
            where=str(data_path(kinds)),
            hint="make it with `entrypoint tokenize`, or train on every token: "
            "data.without_kinds: train_all",
        )
    return SequenceStore(text, None)


def prepare_indexed(
    folder: Path,
    data: DataConfig,
    limits: SequenceConfig,
    *,
    seed: int,
    vocab_size: int,
    identity: dict[str, Any],
    rejects_path: Path,
    check_inputs: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the rows and their record to `folder`; the record.

    check_inputs: as in data/prepared/prepare.py.
    Errors: PostTrainingError for an id that is not below vocab_size, and for the first sequence
    that is bad under on_error: fail.
    """
    builder = TableBuilder()
    with (
        atomic_directory(folder) as temporary,
        Verdicts(data.on_error, rejects_path) as verdicts,
    ):
        for index, (prefix, store) in enumerate(zip(data.indexed, open_stores(data), strict=True)):
            for start in range(0, len(store), _SEQUENCES_AT_ONCE):
                end = min(start + _SEQUENCES_AT_ONCE, len(store))
                made = _batch(store, prefix, range(start, end), limits, verdicts, data.deduplicate)
                if made.ids.max(initial=0) >= vocab_size:
                    raise PostTrainingError(
                        f"has id {made.ids.max()}, the model's tokenizer only {vocab_size} tokens",
                        where=str(prefix),
                        hint="it was tokenized with another tokenizer",
                    )
                builder.add(index, made)
        check_inputs()
        return write_rows(
            temporary,
            builder,
            verdicts,
            data,
            limits,
            seed,
            sources=[{"name": prefix.name, "read_as": "indexed"} for prefix in data.indexed],
            template=None,
            identity=identity,
        )


def _batch(
    store: SequenceStore,
    prefix: Path,
    indices: range,
    limits: SequenceConfig,
    verdicts: Verdicts,
    with_digests: bool,
) -> SequenceBatch:
    """Every sequence, since they are numbered as they are stored; a bad one has no piece."""
    sequences, pieces = [], []
    for index in indices:
        row = store.read(index, 0, int(store.tokens.lengths[index]))
        place = Place(str(prefix), index + 1)
        try:
            own = cut(row.kinds, limits, str(place))
        except BadRow as bad:
            verdicts.reject(place, bad, b"")
            own = []
        sequences.append(Sequence(row.ids, row.kinds))
        pieces.append(own)
    return batch(sequences, pieces, with_digests=with_digests)
