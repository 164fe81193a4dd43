"""From prepared rows to a model folder: the model, its loss, and the rows to train and evaluate."""

from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.data.prepared.dataset import PreparedDataset, figures
from post_training.models.attention import check_packing
from post_training.models.load import check_vocabulary, load_model
from post_training.stages.context import Result, StageContext
from post_training.stages.sft.collator import Collator
from post_training.stages.sft.config import SftConfig
from post_training.stages.sft.evaluation import Evaluation
from post_training.stages.sft.trainer import SftTrainer
from post_training.stages.training.session import Rows, be_deterministic, run_training


def train(
    config: SftConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset,
    evaluation_dataset: PreparedDataset | None,
) -> Result:
    """Errors: see `run_training`."""
    be_deterministic()
    # Padding is no part of the attention or of the loss, so any id will do.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collator = partial(
        Collator, loss=config.loss, pad_token_id=pad, padding_free=config.training.padding_free
    )
    evaluation, eval_steps = None, None
    if config.evaluation is not None and evaluation_dataset is not None:
        batch_size = config.evaluation.per_device_eval_batch_size
        evaluation = Evaluation(
            collator(evaluation_dataset, packed=False), batch_size, context.ranks
        )
        eval_steps = config.evaluation.eval_steps
    make_trainer = partial(
        SftTrainer,
        loss=config.loss,
        collator=collator(dataset, packed=config.rows_are_packed),
        evaluation=evaluation,
        eval_steps=eval_steps,
    )
    record = dataset.record
    rows = Rows(
        {**record["counts"], "num_rows": len(dataset)},
        dataset.template,
        shuffled=not config.data.debug_oom,
        folders=("data", "evaluation"),
    )
    load = partial(_load, config, tokenizer)
    result = run_training(config, context, load, tokenizer, rows, make_trainer)
    return replace(result, metrics={**figures(record), **result.metrics})


def _load(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = load_model(
        config.model.path,
        dtype=config.model.dtype,
        attn_implementation=config.model.attn_implementation,
    )
    check_vocabulary(model, tokenizer)
    on_cpu = config.model.attn_implementation in ("eager", "sdpa")
    if on_cpu and (config.rows_are_packed or config.training.padding_free):
        check_packing(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.sft.max_seq_length > limit:
        raise PostTrainingError(
            f"must be ≤ {limit}, the positions of the model (got {config.sft.max_seq_length})",
            where="sft.max_seq_length",
        )
    return model
