"""Tokenise the documents, write `RUN/dataset`:

PREFIX_text_document.{bin,idx}   the tokens, as Megatron and GPT-NeoX read them
PREFIX_kinds_document.{bin,idx}  what the loss makes of each token (data/rows.py), one byte each
counts.json                      documents, tokens, trained tokens, rejected lines by reason; what
                                 was read of the lines, and what not
rejects.jsonl                    under on_error: quarantine

The bytes depend on the lines and the tokenizer, never on the number of workers.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, remove_leftovers, write_json
from post_training.data.control.documents import (
    DocumentEncoder,
    EncodedDocuments,
    load_span_tokenizer,
    turns_of,
)
from post_training.data.formats.columns import ColumnCounts, ColumnReport, Format, describe_columns
from post_training.data.indexed import INDEXED_KINDS, TEXT, IndexedWriter, best_dtype
from post_training.data.reading import Verdicts
from post_training.data.rows import COMPLETION, BadRow, Place, Record
from post_training.data.sources import Chunk
from post_training.data.sources.open import open_path
from post_training.data.workers import ordered_map
from post_training.stages.config import TokenizeConfig
from post_training.stages.context import Result, StageContext

COUNTS = "counts.json"


@dataclass(frozen=True)
class Rejected:
    """num_before: the good documents of its chunk before it."""

    num_before: int
    place: Place
    bad: BadRow
    raw: bytes


@dataclass
class Counts:
    num_documents: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0

    def add(self, documents: EncodedDocuments) -> None:
        self.num_documents += len(documents.lengths)
        self.num_tokens += len(documents.tokens)
        self.num_trained_tokens += int(np.count_nonzero(documents.kinds == COMPLETION))


def run(config: TokenizeConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _tokenize(config, context))
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics)


def _tokenize(config: TokenizeConfig, context: StageContext) -> dict[str, float]:
    folder = context.run_dir / "dataset"
    remove_leftovers(context.run_dir, "dataset")
    if not folder.exists():
        with atomic_directory(folder) as temporary:
            _write(config, context, temporary)
            context.inputs.check()
    counts = json.loads((folder / COUNTS).read_text())
    return {name: counts[name] for name in asdict(Counts())}


def _write(config: TokenizeConfig, context: StageContext, folder: Path) -> None:
    encoder = DocumentEncoder(
        load_span_tokenizer(config.tokenizer),
        config.control_tokens.user,
        config.control_tokens.assistant,
        config.eod if config.append_eod else None,
    )
    context.log(f"control tokens: {encoder.describe()}")
    counts = Counts()
    with (
        Verdicts(config.on_error, folder / "rejects.jsonl") as verdicts,
        IndexedWriter(
            folder / f"{config.output_prefix}{TEXT}", best_dtype(encoder.vocab_size)
        ) as tokens,
        IndexedWriter(folder / f"{config.output_prefix}{INDEXED_KINDS}", np.uint8) as kinds,
    ):
        found = Format("text", {"text": "text"}, ignored=frozenset(config.ignore))
        report = ColumnReport([found] * len(config.inputs))
        chunks = (
            (index, chunk)
            for index, path in enumerate(config.inputs)
            for chunk in open_path(path).chunks()
        )
        for index, documents, rejected, columns in ordered_map(
            encode_chunk, (encoder, found), chunks, num_workers=config.num_workers
        ):
            report.add(index, columns)
            left = None if config.max_rows is None else config.max_rows - counts.num_documents
            for row in rejected:
                if left is None or row.num_before < left:
                    verdicts.reject(row.place, row.bad, row.raw)
            documents = documents.first(left)
            tokens.append(documents.tokens, documents.lengths)
            kinds.append(documents.kinds, documents.lengths)
            counts.add(documents)
            if counts.num_documents == config.max_rows:
                break
        if not counts.num_documents:
            raise PostTrainingError(f"no document is left: {verdicts.summary()}")
    sources = [report.record(index) for index in range(len(config.inputs))]
    write_json(folder / COUNTS, {**asdict(counts), "rejected": verdicts.counts, "sources": sources})
    for path, source in zip(config.inputs, sources, strict=True):
        for line in describe_columns({"name": path.name, **source}):
            context.log(line)
    context.log(
        f"{counts.num_documents:,} documents, {counts.num_tokens:,} tokens, "
        f"{counts.num_trained_tokens:,} of them trained"
    )
    if verdicts.counts:
        context.log(verdicts.summary())


def encode_chunk(
    state: tuple[DocumentEncoder, Format], item: tuple[int, Chunk]
) -> tuple[int, EncodedDocuments, list[Rejected], ColumnCounts]:
    """The good documents of a chunk of an input, the bad lines between them, and what all hold."""
    (encoder, found), (index, chunk) = state, item
    columns = ColumnCounts()
    read = list(_read(chunk, found, columns))
    good = [turns for _, turns in read if not isinstance(turns, BadRow)]
    encoded = iter(encoder.encode(good))
    documents: list[list[list[int]]] = []
    rejected: list[Rejected] = []
    for record, turns in read:
        result = turns if isinstance(turns, BadRow) else next(encoded)
        if isinstance(result, BadRow):
            rejected.append(Rejected(len(documents), record.place, result, record.raw))
        else:
            documents.append(result)
    return index, encoder.join(documents), rejected, columns


def _read(
    chunk: Chunk, found: Format, columns: ColumnCounts
) -> Iterator[tuple[Record, list[str] | BadRow]]:
    for record in chunk.records():
        columns.num_rows += 1
        try:
            if isinstance(record.value, BadRow):
                raise record.value
            found.check_columns(record.value, columns.filled)
            if not isinstance(text := record.value.get("text"), str):
                what = type(text).__name__ if "text" in record.value else "missing"
                raise BadRow("columns", f"text: must be a string (is {what})")
            yield record, turns_of(text)
        except BadRow as bad:
            yield record, bad
