"""From rows of a prepared dataset to the tensors of a micro-batch.

Every position but the last of a sequence predicts the token after it: its target. The targets of
prompts are there too, for the losses that weigh them.

A row that is one sequence has an attention mask. A packed row has position ids that start again
with each of its sequences, and no mask: the model then lets no sequence see another (transformers'
masking_utils; TRL calls it padding-free). Padding is a sequence of its own at the end of its row.
With `padding_free` a micro-batch is one row, of all its sequences, and there is no padding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from post_training.data.prepared.dataset import PreparedDataset, PreparedRow
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT
from post_training.models.chunked_head import IGNORED
from post_training.stages.sft.config import LossConfig
from post_training.stages.sft.losses import Sums, sequence_weights


@dataclass(frozen=True)
class MicroBatch:
    """inputs: input_ids, and attention_mask or position_ids; int64 [B, T].
    targets: int64 [B, T], IGNORED where a position predicts nothing.
    kinds: uint8 [B, T], of the targets; EXCLUDED where there is none.
    weights: float64 [B, T], c_t but for the factors (losses.py).
    is_token: bool [B, T]; the others are padding.
    rows: numbers of the dataset's rows. num_tokens: without padding. sum_of_squared_lengths: over
    the sequences; what attention costs."""

    inputs: dict[str, Tensor]
    targets: Tensor
    kinds: Tensor
    weights: Tensor
    is_token: Tensor
    sums: Sums
    rows: tuple[int, ...]
    num_tokens: int
    sum_of_squared_lengths: int

    @property
    def continues(self) -> Tensor:
        """Whether the position after has a target of the same sequence; bool [B, T]."""
        asked = self.targets != IGNORED
        return asked & torch.nn.functional.pad(asked[:, 1:], (0, 1))


class Collator:
    def __init__(
        self,
        dataset: PreparedDataset,
        loss: LossConfig,
        *,
        pad_token_id: int,
        packed: bool,
        padding_free: bool = False,
    ):
        self.dataset = dataset
        self.loss = loss
        self.pad_token_id = pad_token_id
        self.packed = packed or padding_free
        self.padding_free = padding_free

    def __call__(self, items: list[dict[str, int]]) -> dict[str, MicroBatch]:
        """{"batch": …}, as what goes through a DataLoader of the Trainer is a mapping."""
        numbers = tuple(item["row"] for item in items)
        rows = [self.dataset.read(number) for number in numbers]
        if self.padding_free:
            rows = [_joined(rows)]
        longest = max(len(row.ids) for row in rows)
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
                lengths = (*row.lengths, longest - length)
                context[index] = np.concatenate([np.arange(each) for each in lengths])
            else:
                context[index, :length] = 1
            start = 0
            for end in np.cumsum(row.lengths).tolist():
                predicting, predicted = slice(start, end - 1), slice(start + 1, end)
                targets[index, predicting] = row.ids[predicted]
                kinds[index, predicting] = row.kinds[predicted]
                own = None if row.weights is None else row.weights[predicted]
                weights[index, predicting], of_sequence = sequence_weights(
                    row.kinds[predicted], own, self.loss
                )
                sums += of_sequence
                start = end
        return {
            "batch": MicroBatch(
                {
                    "input_ids": torch.from_numpy(ids),
                    "position_ids" if self.packed else "attention_mask": torch.from_numpy(context),
                },
                torch.from_numpy(targets),
                torch.from_numpy(kinds),
                torch.from_numpy(weights),
                torch.from_numpy(is_token),
                sums,
                numbers,
                sum(len(row.ids) for row in rows),
                sum(length**2 for row in rows for length in row.lengths),
            )
        }


def coefficients(batch: MicroBatch, of_prompt: float, of_completion: float) -> Tensor:
    """c_t, float32 [B, T]: the weights of the batch times the factors of its global batch."""
    factor = torch.zeros(3, dtype=torch.float64)
    factor[PROMPT], factor[COMPLETION] = of_prompt, of_completion
    return (batch.weights * factor[batch.kinds.long()]).float()


def _joined(rows: list[PreparedRow]) -> PreparedRow:
    weights = None
    if any(row.weights is not None for row in rows):
        ones = (np.ones(len(row.ids), np.float32) if row.weights is None else row.weights
                for row in rows)  # fmt: skip
        weights = np.concatenate(list(ones))
    return PreparedRow(
        np.concatenate([row.ids for row in rows]),
        np.concatenate([row.kinds for row in rows]),
        weights,
        tuple(length for row in rows for length in row.lengths),
    )
