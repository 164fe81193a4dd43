"""Rows of pairs, made ready to be looked at as rows of sequences are (samples.py).

    a row -> for each pair: its prompt, its chosen and its rejected answer, each a Part

An answer begins where the tokens of both differ, or where one is trained; so it may begin with the
end of the prompt, shown as context.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from post_training.data.inspection.samples import Part, Sample, runs_of
from post_training.data.inspection.tokens import Vocabulary
from post_training.data.pairs.dataset import (
    CUT,
    CUT_COMPLETION,
    CUT_PROMPT,
    QUANTILE,
    REF_LOGPROB,
    PairDataset,
)
from post_training.data.pairs.lengths import first_of_sources
from post_training.data.rows import PROMPT, SIDES


def read_pair_samples(
    dataset: PairDataset, vocabulary: Vocabulary, rows: Iterable[int]
) -> Iterator[Sample]:
    """The samples of these rows, numbered from 0.

    Errors: UsageError for an id that is not in the vocabulary.
    """
    starts = first_of_sources(dataset)
    for row in rows:
        parts: list[Part] = []
        pairs = dataset.read(row)
        for pair in pairs:
            source, number = dataset.source_names[pair.source], pair.number - starts[pair.source]
            cut = int(dataset.pairs[pair.number, CUT])
            prompt = pair.prefix.tolist()
            kinds = [PROMPT] * len(prompt)
            told = [("prompt", prompt, kinds, _cut(cut & CUT_PROMPT, "max_prompt_length"))]
            for side, answer, own in zip(
                SIDES, (pair.chosen, pair.rejected), pair.figures, strict=True
            ):
                note = _cut(cut & CUT_COMPLETION, "max_completion_length") + _told(own)
                told.append((side, answer.ids.tolist(), answer.kinds.tolist(), note))
            for what, ids, kinds, note in told:
                is_predicted = what != "prompt" and bool(prompt)
                runs = runs_of(ids, kinds, [1.0] * len(ids), vocabulary, is_predicted=is_predicted)
                own_parts = (source, int(number) + 1, 0, len(ids), tuple(runs))
                parts.append(Part(*own_parts, what=f"{what} of pair", note=note))
        yield Sample(row + 1, tuple(parts), len(pairs))


def _cut(is_cut: int, setting: str) -> str:
    return f", the pair was cut by {setting}" if is_cut else ""


def _told(figures: np.ndarray) -> str:
    """What is known of an answer."""
    logprob, quantile = figures[REF_LOGPROB], figures[QUANTILE]
    text = "" if np.isnan(logprob) else f", reference logprob {logprob:.4g} nats"
    return text if np.isnan(quantile) else f"{text}, quantile {quantile:.4g}"
