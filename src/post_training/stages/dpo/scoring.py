"""What a model has of the answers of a batch: the input of every loss and every figure."""

from typing import Any

import torch

from post_training.models.chunked_head import IGNORED, ChunkedHead
from post_training.models.router_loss import RouterLoss
from post_training.stages.dpo.collator import PairBatch
from post_training.stages.dpo.losses import Answers


def score_answers(
    model: Any, head: ChunkedHead, batch: PairBatch, device: torch.device
) -> tuple[Answers, Answers]:
    """Chosen and rejected, in float64: a ratio is the difference of two large sums."""
    chosen, rejected, _ = score_answers_and_router(model, head, batch, device, None)
    return chosen, rejected


def score_answers_and_router(
    model: Any,
    head: ChunkedHead,
    batch: PairBatch,
    device: torch.device,
    router: RouterLoss | None,
) -> tuple[Answers, Answers, torch.Tensor | None]:
    """As score_answers; and the router's auxiliary loss over the tokens of the batch."""
    targets = batch.targets.to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    of_router = {} if router is None else router.arguments
    with head.scoring(targets):
        outputs = model(**inputs, **of_router, use_cache=False)
    logprobs, _, _ = outputs.logits
    asked = (targets != IGNORED).flatten().nonzero().squeeze(1)
    sums = torch.zeros(2 * batch.num_pairs, dtype=torch.float64, device=device).index_add(
        0, batch.answers.to(device).flatten()[asked], logprobs.flatten()[asked].double()
    )
    of_sides = (sums.view(2, -1), batch.ref_logprobs, batch.lengths, batch.quantiles,
                batch.num_ref_rewards)  # fmt: skip
    chosen, rejected = zip(*(values.to(device) for values in of_sides), strict=True)
    router_loss = None if router is None else router.of(outputs, batch.is_token.to(device))
    return Answers(*chosen), Answers(*rejected), router_loss
