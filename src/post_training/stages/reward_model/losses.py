"""The loss of a reward model.

    L = −log σ(r_chosen − r_rejected) + λ (r_chosen + r_rejected)²      averaged over the pairs

Bradley-Terry (https://arxiv.org/abs/2203.02155, equation 1); the second term, which keeps rewards
around zero, is that of https://arxiv.org/abs/2312.09244.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def pair_losses(chosen_N: Tensor, rejected_N: Tensor, center_coefficient: float) -> Tensor:
    """float32 [N], of each pair. chosen_N, rejected_N: rewards, float32."""
    losses_N = -logsigmoid(chosen_N - rejected_N)
    if center_coefficient:
        losses_N = losses_N + center_coefficient * (chosen_N + rejected_N).square()
    return losses_N
