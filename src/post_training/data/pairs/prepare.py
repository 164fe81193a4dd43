"""From the sources to a prepared dataset of pairs; as data/prepared/prepare.py does for sequences.

    sources -> encode_pairs (workers) -> pairs on disk -> plan_rows (a pair is one sequence)

A row becomes a pair so:

    Preference -> tokens of prompt + chosen and of prompt + rejected -> what both begin with, once,
    and what each goes on with -> cut to the limits -> figures of each answer

The ids of a row (prompt_token_ids, chosen_token_ids, rejected_token_ids: what a model was given and
what it sampled) are used as they are where they are there. Else an answer is rendered and tokenised
with its prompt, as for supervised fine-tuning; a token may then straddle the end of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory
from post_training.data.config import PairConfig, SequenceConfig
from post_training.data.pairs.dataset import (
    CHOSEN,
    CUT,
    CUT_COMPLETION,
    CUT_PROMPT,
    FIGURES,
    PAIRS,
    PAIRS_SCHEMA,
    PREFIX,
    REF_LOGPROB,
    REJECTED,
    SOURCE,
    length_in_row,
)
from post_training.data.prepared.mixture import RowPlan, plan_rows
from post_training.data.prepared.packing import utilisation
from post_training.data.prepared.prepare import (
    EncodedChunk,
    save_rows,
    used_template,
    write_sequences,
)
from post_training.data.prepared.sequences import LENGTH, NUM_TRAINED, make_batch
from post_training.data.reading import Reader, Rejected, Verdicts
from post_training.data.rows import (
    COMPLETION,
    PROMPT,
    SIDES,
    BadRow,
    Conversation,
    Preference,
    Record,
)
from post_training.data.sources import Chunk, Source
from post_training.data.tokenize import Encoder, TokenSequence

# Part of a prepared dataset's identity: to be raised when the same settings give other bytes.
PAIRS_VERSION = 2


def prepare_pairs(
    folder: Path,
    encoder: "PairEncoder",
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
    logprobs of each dataset, or null. The others as in data/prepared/prepare.py.
    Errors: PostTrainingError for a bad row under on_error: fail, and where no pair is left.
    """
    data = encoder.reader.config
    chunks: list[tuple[np.ndarray, np.ndarray]] = []
    with (
        atomic_directory(folder) as temporary,
        Verdicts(data.on_error, rejects_path) as verdicts,
    ):
        builder, described = write_sequences(
            temporary,
            encode_pairs,
            encoder,
            sources,
            verdicts,
            num_ids=encoder.num_ids,
            what="pair",
            on_progress=on_progress,
            on_chunk=lambda chunk: chunks.append((chunk.pairs, chunk.figures)),
        )
        check_inputs()
        table = builder.table()
        pairs, figures = map(np.concatenate, zip(*chunks, strict=True))
        longest = encoder.limits.max_seq_length or int(table.pieces[:, LENGTH].max())
        limits = SequenceConfig(max_seq_length=longest, packing=encoder.limits.packing)
        rows = plan_rows(table, data, limits, seed)
        verdicts.count("duplicate", rows.num_duplicates)
        used, times = np.unique(rows.sequences, return_counts=True)
        record = {
            "schema": PAIRS_SCHEMA,
            "identity": identity,
            "template": asdict(used_template(encoder.encoder.template)),
            "references": identity["references"],
            "rejected": verdicts.counts,
            "sources": [
                {
                    **source,
                    "num_pairs": int((pairs[:, SOURCE] == index).sum()),
                    "num_used": int(times[pairs[used, SOURCE] == index].sum()),
                }
                for index, source in enumerate(described)
            ],
            "counts": _counts(rows, pairs, figures, encoder.limits),
        }
        np.save(temporary / PAIRS, pairs)
        np.save(temporary / FIGURES, figures)
        return save_rows(temporary, rows, record)


@dataclass(frozen=True)
class PairEncoder:
    """All that a worker needs to encode a chunk. num_ids: those of the data must be below it."""

    reader: Reader
    encoder: Encoder
    limits: PairConfig
    num_ids: int


@dataclass(frozen=True)
class EncodedPairs(EncodedChunk):
    """A sequence is what both answers of a pair begin with, then what each goes on with; the length
    of its piece is that of the pair as it lies in a row. The columns of pairs and
    figures are in dataset.py."""

    pairs: Int64[np.ndarray, "S 5"]
    figures: Float64[np.ndarray, "S 2 3"]


def encode_pairs(state: PairEncoder, item: tuple[int, Chunk]) -> EncodedPairs:
    """The work of one process, on one chunk. Errors: PostTrainingError for a row without two
    answers."""
    dataset, chunk = item
    rejected: list[Rejected] = []
    rows = [
        (record, _preference(row, record))
        for record, row in state.reader.rows(chunk, dataset, rejected)
    ]
    sequences: list[TokenSequence] = []
    pairs: list[list[int]] = []
    figures: list[list[list[float]]] = []
    tokens = _both_sequences(state, [row for _, row in rows])
    for (record, row), answers in zip(rows, tokens, strict=True):
        try:
            sequence, pair = _pair(answers, row.figures, state.limits)
            own = [_answer_figures(row.figures, side, state.limits) for side in SIDES]
        except BadRow as bad:
            rejected.append(Rejected(record.place, bad, record.raw))
            continue
        if pair[CUT]:
            # Logprobs of the whole answer are no reference for the tokens that are left of it.
            for figure in own:
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
        make_batch(sequences, pieces, with_digests=with_digests),
        rejected,
        table,
        np.array(figures, np.float64).reshape(-1, 2, 3),
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
    results = [_from_ids(row.figures, side, state.num_ids) for row in rows for side in SIDES]
    missing = [index for index, result in enumerate(results) if result is None]
    conversations = [
        Conversation(row.prompt + getattr(row, side), row.tools)
        for row, side in ((rows[index // 2], SIDES[index % 2]) for index in missing)
    ]
    for index, encoded in zip(missing, state.encoder.encode(conversations), strict=True):
        results[index] = encoded
    return list(zip(results[0::2], results[1::2], strict=True))


def _from_ids(figures: dict[str, Any], side: str, num_ids: int) -> TokenSequence | BadRow | None:
    """Prompt and answer as the row's own token ids; None where it has none."""
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
    prefix = _num_common(*answers)
    kept = _kept_prompt(prefix, limits)
    limit = limits.max_completion_length
    is_long = limit is not None and max(len(each.ids) for each in answers) - prefix > limit
    if limits.truncated_completions == "drop":
        _check_is_whole(figures, is_long, limit)
    end = None if limit is None else prefix + limit
    parts = [TokenSequence(answers[0].ids[kept], answers[0].kinds[kept])]
    parts += [TokenSequence(each.ids[prefix:end], each.kinds[prefix:end]) for each in answers]
    _check_trains(*parts, where=" up to dpo.max_completion_length" if is_long else "")
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
    cut = (CUT_PROMPT if kept != slice(0, prefix) else 0) | (CUT_COMPLETION if is_long else 0)
    return sequence, [*lengths, cut]


def _kept_prompt(prefix: int, limits: PairConfig) -> slice:
    """The tokens of a prompt that are left by dpo.max_prompt_length."""
    limit = limits.max_prompt_length
    if limit is None or prefix <= limit:
        return slice(0, prefix)
    first = prefix - limit if limits.keep_prompt == "end" else 0
    return slice(first, first + limit)


def _check_is_whole(figures: dict[str, Any], is_long: bool, limit: int | None) -> None:
    """Errors: BadRow where an answer was cut off, or is."""
    if any(figures.get(f"{side}_is_truncated") for side in SIDES):
        raise BadRow("truncated", "an answer was cut off when it was generated")
    if is_long:
        problem = f"an answer has more than dpo.max_completion_length {limit} tokens"
        raise BadRow("truncated", problem)


def _check_trains(
    prompt: TokenSequence, chosen: TokenSequence, rejected: TokenSequence, *, where: str
) -> None:
    """where: said of answers that are the same. Errors: BadRow where there is nothing to train."""
    for side, answer in zip(SIDES, (chosen, rejected), strict=True):
        # Without a prompt, nothing predicts the first token of an answer.
        first = 0 if len(prompt.ids) else 1
        if not (answer.kinds[first:] == COMPLETION).any():
            raise BadRow("untrained", f"{side}: no token to train on")
    same_ids = np.array_equal(chosen.ids, rejected.ids)
    if same_ids and np.array_equal(chosen.kinds, rejected.kinds):
        raise BadRow("untrained", f"chosen and rejected are the same tokens{where}")


def _num_common(chosen: TokenSequence, rejected: TokenSequence) -> int:
    """Tokens that both begin with, before any that is trained in either."""
    size = min(len(chosen.ids), len(rejected.ids))
    ends = (chosen.ids[:size] != rejected.ids[:size]) | (chosen.kinds[:size] == COMPLETION)
    ends |= (rejected.kinds[:size] == COMPLETION) | (chosen.kinds[:size] != rejected.kinds[:size])
    return int(ends.argmax()) if ends.any() else size


def _answer_figures(figures: dict[str, Any], side: str, limits: PairConfig) -> list[float]:
    """REF_LOGPROB, QUANTILE and NUM_REF_REWARDS of an answer. Errors: BadRow."""
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


def _counts(
    rows: RowPlan,
    pairs: Int64[np.ndarray, "S 5"],
    figures: Float64[np.ndarray, "S 2 3"],
    limits: PairConfig,
) -> dict[str, Any]:
    """Counts of the rows as they are trained on; a pair that is used twice counts twice.

    num_sequences: pairs. num_tokens: as they lie in the rows. longest_sequence: a prompt with its
    answer.
    """
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
        "utilisation": round(utilisation(int(lengths.sum()), len(totals), capacity), 6),
    }
