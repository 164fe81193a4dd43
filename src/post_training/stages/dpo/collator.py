"""From rows of pairs to the tensors of a micro-batch, in one of three layouts.

    padded     two rows for each pair, prompt + chosen and prompt + rejected, with an attention mask
    packed     the same sequences one after another; position ids start again with each, no mask
    shared     prompt, chosen and rejected one after another: both answers see the prompt, and not
               each other, by a mask of [T, T]; both have the positions they would have alone

In the last, the prompt's last token stands before each answer once more: it predicts the first
token of both, and a position has one target.

        prompt    … p   p c c c    p r r        positions  0 … P−2, P−1 …, P−1 …
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from post_training.data.pairs.dataset import Pair, PairDataset
from post_training.data.pairs.encode import NUM_REF_REWARDS, QUANTILE
from post_training.data.prepared.dataset import PreparedRow
from post_training.data.rows import COMPLETION
from post_training.models.chunked_head import IGNORED


@dataclass(frozen=True)
class PairBatch:
    """N pairs; an answer's number is i where pair i chose it, and N + i where it rejected it.

    inputs: input_ids, and attention_mask or position_ids or both; [B, T].
    targets: int64 [B, T], the id of the completion token that a position predicts, else IGNORED.
    answers: int64 [B, T], the number of the answer that the target is of; 0 where there is none.
    ref_logprobs, lengths, quantiles, num_ref_rewards: float64 [2, N], of chosen and rejected.
    sources: int64 [N]. numbers: of the pairs in the dataset. rows: of the dataset.
    is_token: bool [B, T]; the others are padding. num_tokens: of them all.
    sum_of_squared_lengths: what attention costs.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    answers: Tensor
    ref_logprobs: Tensor
    lengths: Tensor
    quantiles: Tensor
    num_ref_rewards: Tensor
    sources: Tensor
    is_token: Tensor
    numbers: tuple[int, ...]
    rows: tuple[int, ...]
    num_tokens: int
    sum_of_squared_lengths: int

    @property
    def num_pairs(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class _Block:
    """Tokens that see none but each other; each int64 [T]. branches: 0 for what all later tokens
    see, 1 and 2 for what only the same branch sees."""

    ids: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    squared_lengths: int


class PairCollator:
    """ref_logprobs: float64 [S, 2], of every pair of the dataset. packed: rows are laid out without
    padding between sequences, and `padding_free` makes one row of all of them. additive_mask: the
    mask of shared prompts as numbers to add (eager), not as booleans (sdpa)."""

    def __init__(
        self,
        dataset: PairDataset,
        ref_logprobs: np.ndarray,
        *,
        pad_token_id: int,
        packed: bool,
        padding_free: bool,
        share_prompt: bool,
        additive_mask: bool,
    ):
        self.dataset = dataset
        self.ref_logprobs = ref_logprobs
        self.pad_token_id = pad_token_id
        self.packed = packed or padding_free
        self.padding_free = padding_free
        self.share_prompt = share_prompt
        self.additive_mask = additive_mask

    def __call__(self, items: list[dict[str, int]]) -> dict[str, PairBatch]:
        numbers = tuple(item["row"] for item in items)
        return {"batch": self.batch([self.dataset.read(number) for number in numbers], numbers)}

    def batch(self, pairs_of_rows: list[list[Pair]], rows: tuple[int, ...]) -> PairBatch:
        pairs = list(chain.from_iterable(pairs_of_rows))
        laid_out = self._rows(pairs_of_rows, len(pairs))
        size = (len(laid_out), max(sum(len(block.ids) for block in row) for row in laid_out))
        ids, positions = np.full(size, self.pad_token_id, np.int64), np.zeros(size, np.int64)
        targets, answers = np.full(size, IGNORED, np.int64), np.zeros(size, np.int64)
        # Tokens see those of the same block, in the same branch or in none; -1 is padding.
        blocks, branches = np.full(size, -1), np.zeros(size, np.int64)
        for index, row in enumerate(laid_out):
            start = 0
            for number, block in enumerate(row):
                span = (index, slice(start, start + len(block.ids)))
                ids[span], positions[span] = block.ids, block.positions
                targets[span], answers[span] = block.targets, block.answers
                blocks[span], branches[span] = number, block.branches
                start += len(block.ids)
            positions[index, start:] = np.arange(size[1] - start)
        inputs = {"input_ids": torch.from_numpy(ids)}
        if self.packed or self.share_prompt:
            inputs["position_ids"] = torch.from_numpy(positions)
        if self.share_prompt:
            inputs["attention_mask"] = self._mask(blocks, branches)
        elif not self.packed:
            inputs["attention_mask"] = torch.from_numpy((blocks >= 0).astype(np.int64))
        figures = np.stack([pair.figures for pair in pairs], 1)  # [2, N, 3]
        pair_numbers = tuple(pair.number for pair in pairs)
        trained = torch.from_numpy(answers[targets != IGNORED])
        lengths = torch.bincount(trained, minlength=2 * len(pairs)).view(2, -1)
        return PairBatch(
            inputs=inputs,
            targets=torch.from_numpy(targets),
            answers=torch.from_numpy(answers),
            ref_logprobs=torch.from_numpy(self.ref_logprobs[list(pair_numbers)].T.copy()),
            lengths=lengths.double(),
            quantiles=torch.from_numpy(figures[:, :, QUANTILE].copy()),
            num_ref_rewards=torch.from_numpy(figures[:, :, NUM_REF_REWARDS].copy()),
            sources=torch.tensor([pair.source for pair in pairs]),
            is_token=torch.from_numpy(blocks >= 0),
            numbers=pair_numbers,
            rows=rows,
            num_tokens=int((blocks >= 0).sum()),
            sum_of_squared_lengths=sum(block.squared_lengths for row in laid_out for block in row),
        )

    def _rows(self, pairs_of_rows: list[list[Pair]], num_pairs: int) -> list[list[_Block]]:
        numbers = iter(range(num_pairs))
        rows = [
            [block for pair in pairs for block in self._blocks(pair, next(numbers), num_pairs)]
            for pairs in pairs_of_rows
        ]
        if self.padding_free:
            return [[block for row in rows for block in row]]
        if self.packed or self.share_prompt:
            return rows
        return [[block] for row in rows for block in row]

    def _blocks(self, pair: Pair, number: int, num_pairs: int) -> Iterator[_Block]:
        sides = ((pair.chosen, number), (pair.rejected, num_pairs + number))
        if not self.share_prompt or not len(pair.prefix):
            for answer, index in sides:
                yield _sequence(pair.prefix, answer, index)
            return
        kept = len(pair.prefix) - 1
        nothing = np.full(kept, IGNORED)
        shared = _Block(
            pair.prefix[:-1], np.arange(kept), np.zeros(kept, int), nothing, np.zeros(kept, int), 0
        )
        parts = [shared]
        for branch, (answer, index) in enumerate(sides, 1):
            alone = _sequence(pair.prefix[-1:], answer, index)
            parts.append(
                _Block(
                    alone.ids,
                    kept + alone.positions,
                    np.full(len(alone.ids), branch),
                    alone.targets,
                    alone.answers,
                    (kept + len(alone.ids)) ** 2,
                )
            )
        yield _Block(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("ids", "positions", "branches", "targets", "answers")
            ),
            squared_lengths=sum(part.squared_lengths for part in parts) - kept**2,
        )

    def _mask(self, blocks: np.ndarray, branches: np.ndarray) -> Tensor:
        """[B, 1, T, T]: whether position q (the third dimension) sees k."""
        block, branch = torch.from_numpy(blocks), torch.from_numpy(branches)
        sees = (block[:, :, None] == block[:, None]) & (
            (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
        )
        sees = sees.tril()[:, None]
        if not self.additive_mask:
            return sees
        return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)


def _sequence(prefix: np.ndarray, answer: PreparedRow, index: int) -> _Block:
    """A prompt and one answer, as they are alone."""
    ids = np.concatenate([prefix, answer.ids]).astype(np.int64)
    length = len(ids)
    targets = np.full(length, IGNORED, np.int64)
    trained = np.zeros(length, bool)  # by the position that predicts
    trained[: length - 1] = np.concatenate(
        [np.zeros(len(prefix), bool), answer.kinds == COMPLETION]
    )[1:]
    targets[:-1][trained[:-1]] = ids[1:][trained[:-1]]
    return _Block(
        ids,
        np.arange(length),
        np.zeros(length, np.int64),
        targets,
        np.where(trained, index, 0),
        length**2,
    )
