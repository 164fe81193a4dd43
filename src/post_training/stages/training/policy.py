"""The model that is trained, read and checked against what it is trained on."""

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.models.attention import check_packing
from post_training.models.load import check_vocabulary, load_model
from post_training.models.positions import check_positions
from post_training.stages.training.config import TrainingStageConfig


def load_policy(
    config: TrainingStageConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    where: str,
) -> PreTrainedModel:
    """longest: sequence, in tokens. where: what says so.

    Errors: PostTrainingError when the model can't have such sequences, tokens or rows.
    """
    model = load_model(
        config.model.path,
        dtype=config.model.dtype,
        attn_implementation=config.model.attn_implementation,
    )
    if model.config.get_text_config() is not model.config:
        raise PostTrainingError(
            f"it is loaded as a model of more than text, {type(model).__name__}, which can't be "
            "trained here",
            where=str(config.model.path),
        )
    check_vocabulary(model, tokenizer)
    on_cpu = config.model.attn_implementation in ("eager", "sdpa")
    if on_cpu and (config.rows_are_packed or config.training.padding_free):
        check_packing(model)
    check_positions(model.config, longest, where=where)
    return model
