"""Token sequences in batches, and which pieces of one that is too long are used.

A sequence is what one row of a source became. A *piece* of it, at most as long as the limit, is
what is packed and trained on; most sequences are one piece. Position 0 of a piece is never
predicted, so a token there is never trained.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8

from post_training.core.errors import PostTrainingError
from post_training.data.config import SequenceConfig
from post_training.data.rows import COMPLETION, BadRow
from post_training.data.tokenize import TokenSequence

# Columns of an array of pieces, int64 [P, 4]; start and length in tokens.
SEQUENCE, START, LENGTH, NUM_TRAINED = range(4)


@dataclass(frozen=True)
class SequenceBatch:
    """Several sequences as flat arrays.

    weights: None when each is 1. num_prompt_tokens: those before the first COMPLETION token.
    digests: 16 bytes each, or none. pieces: see the columns; SEQUENCE counts within the batch.
    """

    ids: Int32[np.ndarray, " T"]
    kinds: UInt8[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"] | None
    lengths: Int64[np.ndarray, " S"]
    num_prompt_tokens: Int64[np.ndarray, " S"]
    digests: Shaped[np.ndarray, " digests"]
    pieces: Int64[np.ndarray, "pieces 4"]


def cut_to_limit(
    kinds: UInt8[np.ndarray, " T"], config: SequenceConfig, where: str
) -> list[tuple[int, int, int]]:
    """(start, length, number of trained tokens) of the pieces to use, at least one.

    A piece with nothing to train is left out. kinds: of the whole sequence. where: the
    place of its row.
    Errors: BadRow ("too-long", "untrained"); PostTrainingError for overlong: fail.
    """
    limit, length = config.max_seq_length, len(kinds)
    end = length
    if length > limit:
        problem = f"{length} tokens, more than sft.max_seq_length {limit}"
        if config.overlong == "fail":
            raise PostTrainingError(problem, where=where, hint="choose another sft.overlong")
        if config.overlong == "drop":
            raise BadRow("too-long", problem)
        if config.overlong == "truncate":
            end = limit
    pieces = []
    for start in range(0, end, limit):
        piece = kinds[start : min(start + limit, end)]
        if num_trained := int(np.count_nonzero(piece[1:] == COMPLETION)):
            pieces.append((start, len(piece), num_trained))
    if not pieces:
        of = f"the first {end} of {length} tokens" if end < length else f"its {length} tokens"
        raise BadRow("untrained", f"nothing to train on in {of}")
    return pieces


def make_batch(
    sequences: list[TokenSequence],
    pieces: list[list[tuple[int, int, int]]],
    *,
    with_digests: bool,
) -> SequenceBatch:
    """Join sequences to one batch. pieces[i]: (start, length, trained tokens) of the pieces of
    sequences[i]. with_digests: if not, the batch has none."""
    weights = None
    if any(sequence.weights is not None for sequence in sequences):
        weights = np.concatenate([_weights(sequence) for sequence in sequences])
    rows = [(index, *piece) for index, own in enumerate(pieces) for piece in own]
    return SequenceBatch(
        ids=_joined([sequence.ids for sequence in sequences], np.int32),
        kinds=_joined([sequence.kinds for sequence in sequences], np.uint8),
        weights=weights,
        lengths=np.array([len(sequence.ids) for sequence in sequences], np.int64),
        num_prompt_tokens=np.array([_num_prompt(each) for each in sequences], np.int64),
        digests=np.array([_digest(sequence) for sequence in sequences if with_digests], "S16"),
        pieces=np.array(rows, np.int64).reshape(-1, 4),
    )


def _num_prompt(sequence: TokenSequence) -> int:
    # 0 where there is no COMPLETION at all, where `find` gives -1.
    return max(sequence.kinds.tobytes().find(COMPLETION), 0)


def _weights(sequence: TokenSequence) -> Float32[np.ndarray, " T"]:
    if sequence.weights is None:
        return np.ones(len(sequence.ids), np.float32)
    return sequence.weights


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _digest(sequence: TokenSequence) -> bytes:
    # The same ids with other kinds or weights train something else, so they are no duplicate.
    digest = hashlib.blake2b(sequence.ids.tobytes(), digest_size=16)
    digest.update(sequence.kinds.tobytes())
    if sequence.weights is not None:
        digest.update(sequence.weights.tobytes())
    return digest.digest()
