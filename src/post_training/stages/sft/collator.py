"""From rows of a prepared dataset to the tensors of a micro-batch.

labels are the ids on the tokens to be trained, and -100 on all others. The first token of each
sequence has none: nothing before it predicts it.

A row that is one sequence has an attention mask. A packed row has position ids that start again
with each of its sequences, and no mask: the model then lets no sequence see another (transformers'
masking_utils; TRL calls it padding-free). Padding is a sequence of its own at the end of its row.
"""

import torch

from post_training.data.prepared.dataset import PreparedDataset, PreparedRow
from post_training.data.rows import COMPLETION

IGNORED = -100


class Collator:
    """batch["num_tokens"]: a number, without padding; to be taken out before the model."""

    def __init__(self, dataset: PreparedDataset, *, pad_token_id: int, packed: bool):
        self.dataset = dataset
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, items: list[dict[str, int]]) -> dict[str, torch.Tensor | int]:
        """input_ids, labels, and attention_mask or position_ids; each int64 [rows, longest]."""
        rows = [self.dataset.read(item["row"]) for item in items]
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
        }
        context = torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][index, :length] = torch.from_numpy(row.ids)
            batch["labels"][index, :length] = _labels(row)
            if self.packed:
                lengths = (*row.lengths, longest - length)
                context[index] = torch.cat([torch.arange(each) for each in lengths])
            else:
                context[index, :length] = 1
        batch["position_ids" if self.packed else "attention_mask"] = context
        return {**batch, "num_tokens": sum(len(row.ids) for row in rows)}


def _labels(row: PreparedRow) -> torch.Tensor:
    labels = torch.from_numpy(row.ids).to(torch.int64)
    labels[torch.from_numpy(row.kinds) != COMPLETION] = IGNORED
    labels[torch.tensor([0, *row.lengths[:-1]]).cumsum(0)] = IGNORED
    return labels
