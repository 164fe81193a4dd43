"""The training's own loss and figures (metrics.py) over pairs that are not trained on."""

from typing import Any

import torch
from torch import Tensor

from post_training.models.chunked_head import ChunkedHead
from post_training.stages.context import Ranks
from post_training.stages.dpo.collator import PairBatch, PairCollator
from post_training.stages.dpo.config import LossConfig
from post_training.stages.dpo.losses import pair_losses
from post_training.stages.dpo.metrics import PairMetrics
from post_training.stages.dpo.scoring import score_answers
from post_training.stages.training.evaluation import Evaluation


class DpoEvaluation(Evaluation):
    def __init__(self, collator: PairCollator, loss: LossConfig, batch_size: int, ranks: Ranks):
        self._loss = loss
        self._pair_metrics = PairMetrics(loss, collator.dataset.source_names)
        super().__init__(collator, len(collator.dataset), batch_size, ranks)

    def batch_sums(
        self, batch: PairBatch, model: Any, head: ChunkedHead, device: torch.device
    ) -> dict[str, Tensor | float]:
        chosen, rejected = score_answers(model, head, batch, device)
        loss = pair_losses(chosen, rejected, self._loss).sum()
        return {"loss": loss, **self._pair_metrics.sums(chosen, rejected, batch.sources)}

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["num_pairs"], **self._pair_metrics.figures(sums)}
