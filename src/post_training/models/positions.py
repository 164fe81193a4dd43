"""How long a text a model reads, and how long one may be that is computed alike in every batch.

With rotary embeddings of the kind `longrope` (Phi-3, Phi-4-mini) transformers takes one set of
factors for all rows of a batch: the short ones, or the long ones as soon as one row goes beyond
original_max_position_embeddings. A short row beside a long one, and an answer after a kept prompt,
would then be those of another model; vLLM takes the long ones for every row once it may read so
far. So no row may go beyond.
"""

from typing import Any

from transformers import PreTrainedConfig

from post_training.core.errors import PostTrainingError


def most_positions(config: PreTrainedConfig) -> int | None:
    """Tokens of a text, at most; None where config.json sets no limit."""
    limits = [_positions(config), batch_limit(config)]
    return min((limit for limit in limits if limit is not None), default=None)


def batch_limit(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a row doesn't depend on the rows beside it; None where it never does."""
    settings = config.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    found = [
        kind.get("original_max_position_embeddings")
        or getattr(settings, "original_max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min((limit for limit in found if limit is not None), default=None)


def check_positions(config: PreTrainedConfig, longest: int, *, where: str) -> None:
    """Errors: PostTrainingError when a row of `longest` tokens is too long for the model."""
    limit, own = most_positions(config), _positions(config)
    if limit is None or longest <= limit:
        return
    if own is not None and longest > own:
        problem, hint = f"must be ≤ {own}, the positions of the model (got {longest})", None
    else:
        problem = (
            f"must be ≤ {limit}, the model's original_max_position_embeddings (got {longest}): "
            "beyond it transformers computes all rows of a batch by other factors (longrope)"
        )
        hint = "use shorter rows; longer ones are not supported with this model"
    raise PostTrainingError(problem, where=where, hint=hint)


def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
