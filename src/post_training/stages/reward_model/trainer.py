"""The trainer of `entrypoint reward-model`."""

from typing import Any

from torch import Tensor

from post_training.stages.dpo.collator import PairBatch
from post_training.stages.reward_model.losses import pair_losses
from post_training.stages.training.trainer import Count, Trainer


class RewardTrainer(Trainer):
    """center_coefficient: of losses.py."""

    def __init__(self, *, center_coefficient: float, **others: Any):
        self._center_coefficient = center_coefficient
        self._num_pairs = 0.0
        super().__init__(**others)

    def prepare_step(self, batches: list[PairBatch]) -> None:
        [self._num_pairs] = self.all_ranks_sum([sum(batch.num_pairs for batch in batches)])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, PairBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the mean over the global batch's pairs, times the number of
        ranks, over which gradients are averaged."""
        batch = inputs["batch"]
        tensors = {name: tensor.to(self.args.device) for name, tensor in batch.inputs.items()}
        rewards = model(**tensors, use_cache=False).logits.float().squeeze(1)
        chosen, rejected = rewards[0::2], rewards[1::2]
        losses = pair_losses(chosen, rejected, self._center_coefficient)
        loss = losses.sum() * (self._context.ranks.world_size / self._num_pairs)
        margins = (chosen - rejected).detach().double()
        sums = {
            "num_pairs": float(batch.num_pairs),
            "rewards/chosen": chosen.detach().double().sum(),
            "rewards/rejected": rejected.detach().double().sum(),
            "rewards/margins": margins.sum(),
            "rewards/accuracies": (margins > 0).double().sum(),
        }
        self.count(
            Count(
                loss=loss.detach(),
                rows=batch.rows,
                num_sequences=batch.num_pairs,
                num_tokens=batch.num_tokens,
                num_trained_tokens=batch.num_tokens,
                sum_of_squared_lengths=batch.sum_of_squared_lengths,
                sums=sums,
            )
        )
        return loss

    def derived_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the pairs."""
        number = sums["num_pairs"]
        return {name: total / number for name, total in sums.items() if name != "num_pairs"}
