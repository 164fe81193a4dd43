"""From a chunk of a source to token sequences: the work of one process, on one chunk.

record -> rows of its format -> tokens and kinds -> pieces within the limit
"""

from dataclasses import dataclass

from post_training.core.errors import PostTrainingError
from post_training.data.config import SequenceConfig
from post_training.data.prepared.sequences import SequenceBatch, batch, cut
from post_training.data.reading import Reader, Rejected
from post_training.data.rows import BadRow, Conversation, Record, Text
from post_training.data.sources import Chunk
from post_training.data.tokenize import Encoder, Sequence


@dataclass(frozen=True)
class EncodedChunk:
    """dataset: its index. rejected: in the order of the file."""

    dataset: int
    sequences: SequenceBatch
    rejected: list[Rejected]


@dataclass(frozen=True)
class ChunkEncoder:
    """All that a worker needs."""

    reader: Reader
    encoder: Encoder
    limits: SequenceConfig


def encode_chunk(state: ChunkEncoder, item: tuple[int, Chunk]) -> EncodedChunk:
    """Errors: PostTrainingError for a preference, and for overlong: fail."""
    dataset, chunk = item
    rows: list[Conversation | Text] = []
    records: list[Record] = []
    rejected: list[Rejected] = []
    for record in state.reader.records(chunk, dataset):
        try:
            for value in state.reader.values(record, dataset):
                for row in state.reader.parse(value, dataset):
                    rows.append(_conversation_or_text(row, record))
                    records.append(record)
        except BadRow as bad:
            rejected.append(Rejected(record.place, bad, record.raw))
    sequences: list[Sequence] = []
    pieces: list[list[tuple[int, int, int]]] = []
    for record, encoded in zip(records, state.encoder.encode(rows), strict=True):
        try:
            if isinstance(encoded, BadRow):
                raise encoded
            pieces.append(cut(encoded.kinds, state.limits, str(record.place)))
            sequences.append(encoded)
        except BadRow as bad:
            rejected.append(Rejected(record.place, bad, record.raw))
    rejected.sort(key=lambda row: row.place.number)
    with_digests = state.reader.config.deduplicate
    return EncodedChunk(dataset, batch(sequences, pieces, with_digests=with_digests), rejected)


def _conversation_or_text(row: object, record: Record) -> Conversation | Text:
    if isinstance(row, Conversation | Text):
        return row
    raise PostTrainingError(
        "a preference has two answers, and here one is trained on",
        where=str(record.place),
        hint="name it in the dataset's settings: columns: {prompt: prompt, completion: chosen}, "
        "or {messages: chosen}",
    )
