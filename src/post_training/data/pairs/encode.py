"""From a chunk of preference rows to pairs of token sequences: the work of one process.

    Preference -> tokens of prompt + chosen and of prompt + rejected -> what both begin with, once,
    and what each goes on with -> cut to the limits -> figures of each answer

The ids of a row (prompt_token_ids, chosen_token_ids, rejected_token_ids: what a model was given and
what it sampled) are used as they are where they are there. Else an answer is rendered and tokenised
with its prompt, as for supervised fine-tuning; a token may then straddle the end of the prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from post_training.core.errors import PostTrainingError
from post_training.data.config import PairConfig
from post_training.data.prepared.sequences import SequenceBatch, batch
from post_training.data.reading import Reader, Rejected
from post_training.data.rows import COMPLETION, PROMPT, BadRow, Conversation, Preference, Record
from post_training.data.sources import Chunk
from post_training.data.tokenize import Encoder, TokenSequence

ANSWERS = ("chosen", "rejected")
# Columns of the table of pairs, int64 [S, 5]: tokens that both begin with, tokens that each goes on
# with, what was cut off, and the number of the dataset.
PREFIX, CHOSEN, REJECTED, CUT, SOURCE = range(5)
CUT_PROMPT, CUT_COMPLETION = 1, 2
# Columns of an answer's figures, float64 [S, 2, 3]; NaN where a figure isn't known.
REF_LOGPROB, QUANTILE, NUM_REF_REWARDS = range(3)


@dataclass(frozen=True)
class PairEncoder:
    """All that a worker needs. num_ids: those of the data must be below it."""

    reader: Reader
    encoder: Encoder
    limits: PairConfig
    num_ids: int


@dataclass(frozen=True)
class EncodedPairs:
    """sequences: of each pair, what both begin with, then what each goes on with; a piece's length
    is that of the pair as it lies in a row. pairs, figures: see the columns. rejected: in the order
    of the file."""

    dataset: int
    sequences: SequenceBatch
    pairs: np.ndarray
    figures: np.ndarray
    rejected: list[Rejected]


def length_in_row(pair: np.ndarray, *, share_prompt: bool) -> int:
    """Tokens of a pair as it is laid out in a row (train/dpo_loss.py). pair: int64 [5].

    With a shared prompt its last token is there once more for each answer, to predict its first.
    """
    prefix, answers = int(pair[PREFIX]), int(pair[CHOSEN] + pair[REJECTED])
    return answers + (prefix + 1 if share_prompt and prefix else 2 * prefix)


def encode_pairs(state: PairEncoder, item: tuple[int, Chunk]) -> EncodedPairs:
    """Errors: PostTrainingError for a row without two answers."""
    dataset, chunk = item
    rows: list[tuple[Record, Preference]] = []
    rejected: list[Rejected] = []
    for record in state.reader.records(chunk, dataset):
        try:
            for value in state.reader.values(record, dataset):
                for row in state.reader.parse(value, dataset):
                    rows.append((record, _preference(row, record)))
        except BadRow as bad:
            rejected.append(Rejected(record.place, bad, record.raw))
    sequences: list[TokenSequence] = []
    pairs: list[list[int]] = []
    figures: list[list[list[float]]] = []
    tokens = _both_sequences(state, [row for _, row in rows])
    for (record, row), answers in zip(rows, tokens, strict=True):
        try:
            sequence, pair = _pair(answers, row.figures, state.limits)
            own = [_answer_figures(row.figures, side, state.limits) for side in ANSWERS]
        except BadRow as bad:
            rejected.append(Rejected(record.place, bad, record.raw))
            continue
        if pair[CUT]:
            for figure in own:  # they are of other tokens than those that are trained
                figure[REF_LOGPROB] = float("nan")
        sequences.append(sequence)
        pairs.append([*pair, dataset])
        figures.append(own)
    rejected.sort(key=lambda row: row.place.number)
    table = np.array(pairs, np.int64).reshape(-1, 5)
    share = state.limits.share_prompt
    pieces = [
        [(0, length_in_row(pair, share_prompt=share), int((each.kinds == COMPLETION).sum()))]
        for each, pair in zip(sequences, table, strict=True)
    ]
    with_digests = state.reader.config.deduplicate
    return EncodedPairs(
        dataset,
        batch(sequences, pieces, with_digests=with_digests),
        table,
        np.array(figures, np.float64).reshape(-1, 2, 3),
        rejected,
    )


def _preference(row: object, record: Record) -> Preference:
    if isinstance(row, Preference):
        return row
    raise PostTrainingError(
        "the row has one answer, and preferences have two",
        where=str(record.place),
        hint="name them in the dataset's settings: columns: {chosen: …, rejected: …}",
    )


def _both_sequences(
    state: PairEncoder, rows: list[Preference]
) -> list[tuple[TokenSequence | BadRow, TokenSequence | BadRow]]:
    """Tokens and kinds of prompt + chosen and of prompt + rejected, for each row."""
    results = [_from_ids(row.figures, side, state.num_ids) for row in rows for side in ANSWERS]
    missing = [index for index, result in enumerate(results) if result is None]
    conversations = [
        Conversation(row.prompt + getattr(row, side), row.tools)
        for row, side in ((rows[index // 2], ANSWERS[index % 2]) for index in missing)
    ]
    for index, encoded in zip(missing, state.encoder.encode(conversations), strict=True):
        results[index] = encoded
    return list(zip(results[0::2], results[1::2], strict=True))


def _from_ids(figures: dict[str, Any], side: str, num_ids: int) -> TokenSequence | BadRow | None:
    """Of the ids in the data; None where they aren't there."""
    columns = ("prompt_token_ids", f"{side}_token_ids")
    if any(column not in figures for column in columns):
        return None
    for column in columns:
        ids = figures[column]
        if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
            return BadRow("columns", f"{column}: must be a list of integers")
        if wrong := [each for each in ids if not 0 <= each < num_ids]:
            problem = f"{column}: must be from 0 to {num_ids - 1} (got {wrong[0]})"
            return BadRow("columns", problem)
    prompt, completion = (figures[column] for column in columns)
    kinds = [PROMPT] * len(prompt) + [COMPLETION] * len(completion)
    return TokenSequence(np.array(prompt + completion, np.int32), np.array(kinds, np.uint8))


def _pair(
    answers: tuple[TokenSequence | BadRow, TokenSequence | BadRow],
    figures: dict[str, Any],
    limits: PairConfig,
) -> tuple[TokenSequence, list[int]]:
    """The pair's sequence, and the first columns of its entry in the table. Errors: BadRow."""
    for answer in answers:
        if isinstance(answer, BadRow):
            raise answer
        if answer.weights is not None:
            raise BadRow("columns", "weight: an answer's weight can be 0 or 1 here")
    chosen, rejected = answers
    prefix = _num_common(chosen, rejected)
    kept = slice(0, prefix)
    cut = 0
    if limits.max_prompt_length is not None and prefix > limits.max_prompt_length:
        cut |= CUT_PROMPT
        first = prefix - limits.max_prompt_length if limits.keep_prompt == "end" else 0
        kept = slice(first, first + limits.max_prompt_length)
    limit = limits.max_completion_length
    if limit is not None and max(len(each.ids) for each in answers) - prefix > limit:
        cut |= CUT_COMPLETION
    was_cut = any(figures.get(f"{side}_is_truncated") for side in ANSWERS)
    if limits.truncated_completions == "drop" and (was_cut or cut & CUT_COMPLETION):
        raise BadRow(
            "truncated",
            "an answer was cut off when it was generated"
            if was_cut
            else f"an answer has more than dpo.max_completion_length {limit} tokens",
        )
    end = None if limit is None else prefix + limit
    parts = [TokenSequence(chosen.ids[kept], chosen.kinds[kept])]
    for side, answer in zip(ANSWERS, answers, strict=True):
        parts.append(TokenSequence(answer.ids[prefix:end], answer.kinds[prefix:end]))
        trained = parts[-1].kinds == COMPLETION
        if not len(parts[0].ids):
            trained = trained[1:]  # nothing predicts the first token
        if not trained.any():
            raise BadRow("untrained", f"{side}: no token to train on")
    if np.array_equal(parts[1].ids, parts[2].ids) and np.array_equal(
        parts[1].kinds, parts[2].kinds
    ):
        where = " up to dpo.max_completion_length" if cut & CUT_COMPLETION else ""
        raise BadRow("untrained", f"chosen and rejected are the same tokens{where}")
    sequence = TokenSequence(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.kinds for part in parts]),
    )
    lengths = [len(part.ids) for part in parts]
    if limits.max_seq_length is not None:
        length = length_in_row(np.array([*lengths, 0, 0]), share_prompt=limits.share_prompt)
        if length > limits.max_seq_length:
            problem = f"the pair has {length} tokens, more than dpo.max_seq_length"
            raise BadRow("too-long", f"{problem} {limits.max_seq_length}")
    return sequence, [*lengths, cut]


def _num_common(chosen: TokenSequence, rejected: TokenSequence) -> int:
    """Tokens that both begin with, before any that is trained in either."""
    size = min(len(chosen.ids), len(rejected.ids))
    ends = (chosen.ids[:size] != rejected.ids[:size]) | (chosen.kinds[:size] == COMPLETION)
    ends |= (rejected.kinds[:size] == COMPLETION) | (chosen.kinds[:size] != rejected.kinds[:size])
    return int(ends.argmax()) if ends.any() else size


def _answer_figures(figures: dict[str, Any], side: str, limits: PairConfig) -> list[float]:
    """In the order of the columns. Errors: BadRow."""
    unknown = float("nan")
    values = {
        column: figures.get(column)
        for column in (f"ref_{side}_logprob", f"{side}_reward", f"{side}_quantile_reward")
    }
    for column, value in values.items():
        if isinstance(value, list):
            raise BadRow("columns", f"{column}: must be a number")
    logprob, reward, quantile = values.values()
    if logprob is not None and logprob > 0:
        raise BadRow("columns", f"ref_{side}_logprob: must be ≤ 0 (got {logprob})")
    if quantile is not None and not 0 <= quantile <= 1:
        raise BadRow("columns", f"{side}_quantile_reward: must be from 0 to 1 (got {quantile})")
    references = figures.get("ref_rewards", [])
    if not isinstance(references, list):
        raise BadRow("columns", "ref_rewards: must be a list of numbers")
    wanted = limits.num_ref_rewards
    if wanted is not None:
        if len(references) < wanted or reward is None:
            raise BadRow(
                "columns",
                f"dpo.num_ref_rewards {wanted} needs {side}_reward and as many ref_rewards "
                f"(there are {len(references)})",
            )
        references, quantile = references[:wanted], None
    if quantile is None and references and reward is not None:
        quantile = float(np.mean(np.array(references) <= reward))
    return [
        unknown if logprob is None else float(logprob),
        unknown if quantile is None else float(quantile),
        float(len(references)) if references else unknown,
    ]
