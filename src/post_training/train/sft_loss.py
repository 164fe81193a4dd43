"""The losses of supervised fine-tuning, and the micro-batches they are taken of.

One weight for each token, one sum. t runs over the predicted tokens of a global batch (every rank,
every accumulation step), P of them prompt, C completion; a_t is a completion token's own weight in
the data (1 unless set there) and w the prompt_loss_weight. CE_t = −log p(x_t | x_<t). Everything is
summed in float32 or better.

    sft      Σ_{P∪C} a_t CE_t / Σ a_t
    plw      (w Σ_P CE_t + Σ_C a_t CE_t) / (w |P| + Σ_C a_t)           arXiv 2401.13586
    ln-plw   w Σ_P CE_t / |P| + Σ_C a_t CE_t / Σ_C a_t
    irl      as ln-plw, with CE_t + λ (V_t + log p_t − γ V_{t+1})²     arXiv 2409.01369
             V_t = log Σ_v exp z_t[v], and 0 after the last token of its sequence

With sequence_level_loss the fractions are of each sequence alone, and the loss is the mean of the
sequences. An empty span contributes 0. A packed row is as many sequences as were packed into it.

So each loss is Σ c_t ℓ_t. The collator knows c_t up to two factors, one for prompts and one for
completions; these need the sums over the global batch.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from torch import Tensor

from post_training.data.prepared.dataset import PreparedDataset, PreparedRow
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT
from post_training.models.context_parallel import RowPart
from post_training.models.head import IGNORED
from post_training.train.config import SftLossConfig
from post_training.train.loss import MicroBatch, round_up

SPANS = (("prompt", PROMPT), ("completion", COMPLETION))


@dataclass(frozen=True)
class Sums:
    """Of some sequences: |P|, Σ_C a_t, and their number. They add up over ranks and batches."""

    num_prompt: float = 0.0
    completion_weight: float = 0.0
    num_sequences: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, float, float]:
        return self.num_prompt, self.completion_weight, self.num_sequences


def sequence_weights(
    kinds_T: UInt8[np.ndarray, " T"],
    weights_T: Float32[np.ndarray, " T"] | None,
    loss: SftLossConfig,
) -> tuple[Float64[np.ndarray, " T"], Sums]:
    """c_t of one sequence's predicted tokens but for the factors; and its sums.

    kinds_T, weights_T: of the predicted tokens: all but the first of the sequence.
    """
    prompt_T = (kinds_T == PROMPT).astype(np.float64)
    completion_T = (kinds_T == COMPLETION).astype(np.float64)
    if weights_T is not None:
        completion_T *= weights_T
    sums = Sums(float(prompt_T.sum()), float(completion_T.sum()), 1.0)
    of_prompt, of_completion = _shares(sums, loss) if loss.sequence_level_loss else (1.0, 1.0)
    return of_prompt * prompt_T + of_completion * completion_T, sums


def factors(sums: Sums, loss: SftLossConfig) -> tuple[float, float]:
    """(of prompt tokens, of completion tokens): what c_t of `sequence_weights` is multiplied by,
    given the sums over the global batch."""
    if loss.sequence_level_loss:
        return _fraction(1.0, sums.num_sequences), _fraction(1.0, sums.num_sequences)
    return _shares(sums, loss)


def _shares(sums: Sums, loss: SftLossConfig) -> tuple[float, float]:
    """What a prompt token and a completion token of weight 1 count in the loss over `sums`."""
    w = 1.0 if loss.name == "sft" else loss.prompt_loss_weight
    if loss.name in ("sft", "plw"):
        total = w * sums.num_prompt + sums.completion_weight
        return _fraction(w, total), _fraction(1.0, total)
    return _fraction(w, sums.num_prompt), _fraction(1.0, sums.completion_weight)


def _fraction(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def token_losses(
    logprobs_BT: Float32[Tensor, "B T"],
    values_BT: Float32[Tensor, "B T"],
    continues_BT: Bool[Tensor, "B T"],
    loss: SftLossConfig,
) -> Float32[Tensor, "B T"]:
    """ℓ_t, differentiable.

    logprobs_BT, values_BT: log p and V of each predicting position. continues_BT: whether
    the next position predicts a token of the same sequence; V_{t+1} is 0 where not.
    """
    if loss.name != "irl":
        return -logprobs_BT
    next_BT = torch.zeros_like(values_BT)
    next_BT[:, :-1] = torch.where(continues_BT[:, :-1], values_BT[:, 1:], 0.0)
    difference = values_BT + logprobs_BT - loss.irl_gamma * next_BT
    return -logprobs_BT + loss.irl_lambda * difference**2


def span_losses(sums: dict[str, float]) -> dict[str, float]:
    """Mean cross-entropy of the prompts' and the completions' tokens, each where there are any.

    sums: {"prompt_loss": sum, "num_prompt_tokens": number}, and the same for completions.
    """
    return {
        f"{name}_loss": sums[f"{name}_loss"] / sums[f"num_{name}_tokens"]
        for name, _ in SPANS
        if sums[f"num_{name}_tokens"]
    }


@dataclass(frozen=True, kw_only=True)
class SftBatch(MicroBatch):
    """Every position but the last of a sequence predicts the token after it: its target. The
    targets of prompts are there too, for the losses that weigh them.

    kinds: of the targets; EXCLUDED where there is none.
    weights: c_t but for the factors.
    sums: over the sequences of the batch.
    """

    kinds: UInt8[Tensor, "B T"]
    weights: Float64[Tensor, "B T"]
    sums: Sums

    @property
    def continues(self) -> Bool[Tensor, "B T"]:
        """Whether the position after has a target of the same sequence."""
        asked = self.targets != IGNORED
        return asked & torch.nn.functional.pad(asked[:, 1:], (0, 1))


class SftCollator:
    """From rows of a prepared dataset to a micro-batch.

    A row that is one sequence has an attention mask. A packed row has position ids that start again
    with each of its sequences, and no mask: the model then lets no sequence see another
    (transformers' masking_utils; TRL calls it padding-free). Padding is a sequence of its own at
    the end of its row. With `padding_free` a micro-batch is one row, of all its sequences, and
    there is no padding.

    num_outputs: ids that the model can give, where it reads more; others are no targets.
    part: of each row, the only one that comes out; what is counted for a row, its first part has.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        loss: SftLossConfig,
        *,
        pad_token_id: int,
        packed: bool,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
        num_outputs: int | None = None,
        part: RowPart | None = None,
    ):
        self.dataset = dataset
        self.loss = loss
        self.num_outputs = num_outputs
        self.pad_token_id = pad_token_id
        self.part = part
        self.packed = packed or padding_free or part is not None
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, items: list[dict[str, int]]) -> dict[str, SftBatch]:
        numbers = tuple(item["row"] for item in items)
        rows = [self._only_outputs(self.dataset.read(number)) for number in numbers]
        if self.padding_free:
            rows = [_join_rows(rows)]
        # Of rows that are shared, each process has as many tokens.
        parts = 1 if self.part is None else self.part.size
        longest = max(len(row.ids) for row in rows)
        longest = round_up(longest, math.lcm(self.pad_to_multiple_of, parts))
        shape = (len(rows), longest)
        ids = np.full(shape, self.pad_token_id, np.int64)
        context = np.zeros(shape, np.int64)
        is_token = np.zeros(shape, bool)
        targets = np.full(shape, IGNORED, np.int64)
        kinds = np.full(shape, EXCLUDED, np.uint8)
        weights = np.zeros(shape, np.float64)
        sums = Sums()
        for index, row in enumerate(rows):
            length = len(row.ids)
            ids[index, :length], is_token[index, :length] = row.ids, True
            if self.packed:
                # The padding at the end starts again at 0 too, so no sequence sees it.
                lengths = (*row.lengths, longest - length)
                context[index] = np.concatenate([np.arange(each) for each in lengths])
            else:
                context[index, :length] = 1
            start = 0
            for end in np.cumsum(row.lengths).tolist():
                predicting, predicted = slice(start, end - 1), slice(start + 1, end)
                targets[index, predicting] = self._targets(row.ids[predicted])
                kinds[index, predicting] = row.kinds[predicted]
                own = None if row.weights is None else row.weights[predicted]
                weights[index, predicting], of_sequence = sequence_weights(
                    row.kinds[predicted], own, self.loss
                )
                sums += of_sequence
                start = end
        batch = SftBatch(
            inputs={
                "input_ids": torch.from_numpy(ids),
                "position_ids" if self.packed else "attention_mask": torch.from_numpy(context),
            },
            targets=torch.from_numpy(targets),
            kinds=torch.from_numpy(kinds),
            weights=torch.from_numpy(weights),
            is_token=torch.from_numpy(is_token),
            sums=sums,
            rows=numbers,
            num_tokens=sum(len(row.ids) for row in rows),
            sum_of_squared_lengths=sum(length**2 for row in rows for length in row.lengths),
        )
        return {"batch": batch if self.part is None else _part_of(batch, self.part)}

    def _targets(self, ids_T: np.ndarray) -> np.ndarray:
        if self.num_outputs is None:
            return ids_T
        return np.where(ids_T < self.num_outputs, ids_T, IGNORED)

    def _only_outputs(self, row: PreparedRow) -> PreparedRow:
        """Without a weight, in the loss and in what it is divided by, for what can't be given."""
        if self.num_outputs is None:
            return row
        kinds = np.where(row.ids < self.num_outputs, row.kinds, EXCLUDED).astype(row.kinds.dtype)
        return replace(row, kinds=kinds)


def coefficients(batch: SftBatch, of_prompt: float, of_completion: float) -> Float32[Tensor, "B T"]:
    """c_t, on the batch's device: its weights times the factors of its global
    batch."""
    factor = torch.zeros(3, dtype=torch.float64, device=batch.weights.device)
    factor[PROMPT], factor[COMPLETION] = of_prompt, of_completion
    return (batch.weights * factor[batch.kinds.long()]).float()


def _part_of(batch: SftBatch, part: RowPart) -> SftBatch:
    """The part's tokens. What is counted adds up over the parts to what the whole batch has."""
    span = part.span(batch.targets.shape[1])
    is_token = batch.is_token[:, span]
    is_first = part.index == 0
    return replace(
        batch,
        inputs={name: tensor[:, span] for name, tensor in batch.inputs.items()},
        targets=batch.targets[:, span],
        kinds=batch.kinds[:, span],
        weights=batch.weights[:, span],
        is_token=is_token,
        sums=batch.sums if is_first else Sums(),
        num_tokens=int(is_token.sum()),
        sum_of_squared_lengths=batch.sum_of_squared_lengths if is_first else 0,
    )


def _join_rows(rows: list[PreparedRow]) -> PreparedRow:
    weights = None
    if any(row.weights is not None for row in rows):
        weights = np.concatenate(
            [
                np.ones(len(row.ids), np.float32) if row.weights is None else row.weights
                for row in rows
            ]
        )
    return PreparedRow(
        np.concatenate([row.ids for row in rows]),
        np.concatenate([row.kinds for row in rows]),
        weights,
        tuple(length for row in rows for length in row.lengths),
    )
