"""A loss or gradient that is not finite ends the run before it spoils the weights.

What is asked in every step costs nothing: the step's loss and gradient norm are known to all ranks.
Only when one of them is not finite do the ranks tell each other which of their rows it was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from post_training.core.errors import PostTrainingError
from post_training.stages.context import StageContext

_MOST_RANKS, _MOST_ROWS = 8, 8


@dataclass(frozen=True)
class MicroBatchLoss:
    """Of one micro-batch on this rank. rows: their numbers in the dataset."""

    loss: float
    rows: tuple[int, ...]


def stop_unless_finite(
    step: int,
    loss: float,
    grad_norm: float,
    micro_batches: Sequence[MicroBatchLoss],
    context: StageContext,
    describe_row: Callable[[int], str] = str,
) -> None:
    """Return if loss and gradient norm are finite. To be called by all ranks, before the update.

    loss, grad_norm: of the global batch, the same on every rank. micro_batches: this rank's.
    describe_row: what to call a row, by its number.
    Errors: PostTrainingError, the same on every rank. It names the rows of the micro-batches whose
    loss is not finite; of all of them, where only the gradient isn't.
    """
    if isfinite(loss) and isfinite(grad_norm):
        return
    name, value = ("gradient norm", grad_norm) if isfinite(loss) else ("loss", loss)
    suspects = [batch for batch in micro_batches if not isfinite(batch.loss)]
    own = [describe_row(row) for batch in suspects or micro_batches for row in batch.rows]
    found = context.gather((bool(suspects), own))
    blamed = any(is_suspect for is_suspect, _ in found)
    listed = {
        rank: rows for rank, (is_suspect, rows) in enumerate(found) if is_suspect or not blamed
    }
    raise PostTrainingError(
        f"{name} is not finite at step {step} (got {value}) with {'; '.join(_listing(listed))}; "
        "stopped before its update counts",
        hint="lower training.learning_rate, raise training.warmup, or look at these rows",
    )


def _listing(rows_of_rank: dict[int, list[str]]) -> Iterator[str]:
    for rank, rows in list(rows_of_rank.items())[:_MOST_RANKS]:
        more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
        yield f"rows {', '.join(rows[:_MOST_ROWS])}{more} on rank {rank}"
    if len(rows_of_rank) > _MOST_RANKS:
        yield f"others on {len(rows_of_rank) - _MOST_RANKS} more ranks"
