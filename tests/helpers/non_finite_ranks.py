"""Steps of two ranks that are not finite; what is raised on each."""

from math import inf, nan

from post_training.core.errors import PostTrainingError
from post_training.stages.context import StageContext
from post_training.train.metrics import MicroBatchLoss, stop_unless_finite


def loss_on_second_rank(context: StageContext) -> str:
    losses = (1.0, nan) if context.ranks.rank == 1 else (1.0, 2.0)
    return _words(context, losses, loss=nan, grad_norm=nan)


def gradient_only(context: StageContext) -> str:
    return _words(context, (1.0, 2.0), loss=1.5, grad_norm=inf)


def _words(
    context: StageContext, losses: tuple[float, ...], *, loss: float, grad_norm: float
) -> str:
    first_row = 100 * context.ranks.rank
    batches = [MicroBatchLoss(value, (first_row + n,)) for n, value in enumerate(losses)]
    try:
        stop_unless_finite(7, loss, grad_norm, batches, context)
    except PostTrainingError as error:
        return str(error)
    return "went on"
