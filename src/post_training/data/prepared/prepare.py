"""From the sources to a prepared dataset. Every row is read once, in order, in several processes;
then lengths alone decide which are used, and which share a row.

    sources -> encode_chunk (workers) -> sequences on disk -> plan_rows -> rows, prepared.json

Indexed datasets (.bin/.idx) are sequences already and stay where they are: of these only the rows
and prepared.json are written.

Memory holds some numbers for each row of the sources, never its tokens. The result depends on the
sources, the settings and the tokenizer; not on the number of workers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory
from post_training.data.chat.templates import ChatTemplate
from post_training.data.config import DataConfig, SequenceConfig
from post_training.data.formats.columns import ColumnReport
from post_training.data.indexed import INDEXED_KINDS, TEXT, IndexedWriter, best_dtype, data_path
from post_training.data.prepared.dataset import (
    KINDS,
    OFFSETS,
    PIECES,
    SCHEMA,
    TOKENS,
    WEIGHTS,
    SequenceStore,
    UsedTemplate,
    write_record,
)
from post_training.data.prepared.mixture import RowPlan, SequenceTable, TableBuilder, plan_rows
from post_training.data.prepared.packing import utilisation
from post_training.data.prepared.sequences import (
    LENGTH,
    NUM_TRAINED,
    SEQUENCE,
    SequenceBatch,
    cut_to_limit,
    make_batch,
)
from post_training.data.reading import (
    HasReader,
    Reader,
    Rejected,
    Verdicts,
    name_of,
    read_chunks,
)
from post_training.data.rows import BadRow, Conversation, Place, Record, Text
from post_training.data.sources import Chunk, Source
from post_training.data.tokenize import Encoder, TokenSequence

# Part of a prepared dataset's identity: to be raised when the same settings give other bytes.
VERSION = 3
_SEQUENCES_AT_ONCE = 1000  # in memory, of an indexed dataset


def prepare(
    folder: Path,
    encoder: "ChunkEncoder",
    sources: Sequence[Source],
    *,
    seed: int,
    identity: dict[str, Any],
    rejects_path: Path,
    on_progress: Callable[[int, int], None],
    check_inputs: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the dataset to `folder`, as a whole or not at all; its record.

    identity: what decides its bytes. rejects_path: for on_error: quarantine. on_progress: is told
    the numbers of rows and tokens so far. check_inputs: called once all is read; where it raises,
    no dataset is left.
    Errors: PostTrainingError for the first bad row under on_error: fail, and when none is left.
    """
    data = encoder.reader.config
    with (
        atomic_directory(folder) as temporary,
        Verdicts(data.on_error, rejects_path) as verdicts,
    ):
        builder, described = write_sequences(
            temporary,
            encode_chunk,
            encoder,
            sources,
            verdicts,
            num_ids=encoder.num_ids,
            what="row",
            on_progress=on_progress,
        )
        check_inputs()
        return write_rows(
            temporary,
            builder,
            verdicts,
            data,
            encoder.limits,
            seed,
            sources=described,
            template=used_template(encoder.encoder.template),
            identity=identity,
        )


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
    """Write the rows over `data.indexed` and their record to `folder`; the record.

    The others as in `prepare`.
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
        if not builder.num_pieces:
            raise verdicts.nothing_left("row")
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


@dataclass(frozen=True)
class ChunkEncoder:
    """All that a worker needs to encode a chunk. num_ids: of the tokenizer."""

    reader: Reader
    encoder: Encoder
    limits: SequenceConfig
    num_ids: int


@dataclass(frozen=True)
class EncodedChunk:
    """What a worker made of a chunk of dataset number `dataset`. rejected: in the order of the
    file. history: what the template's way with earlier turns did to the rows, with counts."""

    dataset: int
    sequences: SequenceBatch
    rejected: list[Rejected]
    history: Counter[str] = field(default_factory=Counter, kw_only=True)


def encode_chunk(state: ChunkEncoder, item: tuple[int, Chunk]) -> EncodedChunk:
    """The work of one process, on one chunk: rows -> tokens and kinds -> pieces within the limit.

    Errors: PostTrainingError for a preference, and for overlong: fail.
    """
    dataset, chunk = item
    rejected: list[Rejected] = []
    read = [
        (record, _conversation_or_text(row, record))
        for record, row in state.reader.rows(chunk, dataset, rejected)
    ]
    sequences: list[TokenSequence] = []
    pieces: list[list[tuple[int, int, int]]] = []
    history: Counter[str] = Counter()
    encoded = state.encoder.encode_rows([row for _, row in read])
    for (record, _), row in zip(read, encoded, strict=True):
        try:
            if isinstance(row, BadRow):
                raise row
            own = [
                cut_to_limit(sequence.kinds, state.limits, str(record.place))
                for sequence in row.sequences
            ]
        except BadRow as bad:
            rejected.append(Rejected(record.place, bad, record.raw))
            continue
        pieces += own
        sequences += row.sequences
        if len(own) > 1:
            history += Counter(num_rows_in_several=1, num_sequences_of_them=len(own))
        history["num_thoughts_left_out"] += row.num_left_out
    rejected.sort(key=lambda row: row.place.number)
    with_digests = state.reader.config.deduplicate
    batch = make_batch(sequences, pieces, with_digests=with_digests)
    return EncodedChunk(dataset, batch, rejected, history=+history)


def _conversation_or_text(row: object, record: Record) -> Conversation | Text:
    if isinstance(row, Conversation | Text):
        return row
    raise PostTrainingError(
        "a preference has two answers, and here one is trained on",
        where=str(record.place),
        hint="name it in the dataset's settings: columns: {prompt: prompt, completion: chosen}, "
        "or {messages: chosen}",
    )


State = TypeVar("State", bound=HasReader)
Encoded = TypeVar("Encoded", bound=EncodedChunk)


def write_sequences(
    folder: Path,
    encode: Callable[[State, tuple[int, Chunk]], Encoded],
    encoder: State,
    sources: Sequence[Source],
    verdicts: Verdicts,
    *,
    num_ids: int,
    what: str,
    on_progress: Callable[[int, int], None],
    on_chunk: Callable[[Encoded], None] = lambda chunk: None,
) -> tuple[TableBuilder, list[dict[str, Any]]]:
    """Write what `encode` makes of every chunk; the table of sequences, and each source's record.

    num_ids: every id is below it. what: a sequence is called, in the error where none is left.
    on_progress: as in `prepare`. on_chunk: gets each chunk too, in order.
    """
    data, formats = encoder.reader.config, encoder.reader.formats
    builder, report = TableBuilder(), ColumnReport(formats)
    history = [Counter[str]() for _ in formats]
    with SequenceWriter(folder, best_dtype(num_ids)) as writer:
        for chunk in read_chunks(
            encode, encoder, sources, data, lambda dataset: builder.num_rows[dataset], report
        ):
            for row in chunk.rejected:
                verdicts.reject(row.place, row.bad, row.raw)
            writer.append(chunk.sequences)
            builder.add(chunk.dataset, chunk.sequences)
            history[chunk.dataset] += chunk.history
            on_chunk(chunk)
            on_progress(builder.num_sequences, writer.num_tokens)
        if not builder.num_pieces:
            raise verdicts.nothing_left(what)
    described = [
        {
            "name": name_of(dataset),
            "read_as": found.describe(),
            **report.record(index),
            **({"history": dict(history[index])} if history[index] else {}),
        }
        for index, (dataset, found) in enumerate(zip(data.datasets, formats, strict=True))
    ]
    return builder, described


class SequenceWriter:
    """Appends sequences to a prepared folder; a context manager. dtype: of the ids."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self._tokens = IndexedWriter(folder / TOKENS, dtype)
        self._kinds = IndexedWriter(folder / KINDS, np.uint8)
        self._weights_path = folder / WEIGHTS
        self.num_tokens = 0

    def __enter__(self) -> "SequenceWriter":
        with ExitStack() as stack:
            stack.enter_context(self._kinds)
            stack.enter_context(self._tokens)
            self._files = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    def append(self, batch: SequenceBatch) -> None:
        """Write the sequences of a batch. Errors: PostTrainingError for an id that is too large."""
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
                # The first weights that aren't 1: the file begins with a 1 for every token so far.
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

    builder: has all sequences. sources: what to say of each, beside its counts. identity: what
    decides the bytes.
    Errors: PostTrainingError where a dataset has too few rows for its settings.
    """
    table = builder.table()
    rows = plan_rows(table, data, limits, seed)
    verdicts.count("duplicate", rows.num_duplicates)
    record = {
        "schema": SCHEMA,
        "identity": identity,
        "template": template and asdict(template),
        "rejected": verdicts.counts,
        "sources": [
            {**source, **_counts_of_source(table, rows, dataset)}
            for dataset, source in enumerate(sources)
        ],
        "counts": _counts(table, rows, limits),
    }
    return save_rows(folder, rows, record)


def save_rows(folder: Path, rows: RowPlan, record: dict[str, Any]) -> dict[str, Any]:
    """Write the rows and, last, prepared.json, which is returned."""
    np.save(folder / OFFSETS, rows.offsets)
    np.save(folder / PIECES, np.ascontiguousarray(rows.pieces[:, :3]))
    return write_record(folder, record)


def used_template(template: ChatTemplate) -> UsedTemplate:
    """What prepared.json says of the template."""
    return UsedTemplate(template.name, template.text, template.end_of_turn)


def _counts(table: SequenceTable, rows: RowPlan, limits: SequenceConfig) -> dict[str, Any]:
    """Counts of the rows as they are trained on; a sequence that is used twice counts twice."""
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


def _counts_of_source(table: SequenceTable, rows: RowPlan, dataset: int) -> dict[str, Any]:
    """Counts of one source. generation_ratio: completion tokens over prompt tokens (R_g in
    arXiv:2401.13586), null without any prompt."""
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


def open_stores(data: DataConfig) -> list[SequenceStore]:
    """PREFIX_text_document of each prefix in `data.indexed`, and PREFIX_kinds_document beside it.

    Errors: PostTrainingError for files that are no pair; UsageError for a missing mask.
    """
    return [_open(prefix, data.without_kinds == "train_all") for prefix in data.indexed]


def _open(prefix: Path, train_all: bool) -> SequenceStore:
    text, kinds = (prefix.with_name(prefix.name + ending) for ending in (TEXT, INDEXED_KINDS))
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
            own = cut_to_limit(row.kinds, limits, str(place))
        except BadRow as bad:
            verdicts.reject(place, bad, b"")
            own = []
        sequences.append(TokenSequence(row.ids, row.kinds))
        pieces.append(own)
    return make_batch(sequences, pieces, with_digests=with_digests)
