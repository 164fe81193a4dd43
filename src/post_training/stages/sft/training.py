"""From prepared rows to a model folder: the model, its loss, and the rows to train and evaluate."""

from dataclasses import replace
from functools import partial

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.data.prepared.dataset import PreparedDataset, figures
from post_training.models.device import be_deterministic
from post_training.stages.context import Result, StageContext
from post_training.stages.sft.collator import Collator
from post_training.stages.sft.config import SftConfig
from post_training.stages.sft.evaluation import SftEvaluation
from post_training.stages.sft.trainer import SftTrainer
from post_training.stages.training.policy import load_policy
from post_training.stages.training.session import Rows, run_training


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
        evaluation = SftEvaluation(
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
        shuffled=config.training.shuffle and not config.data.debug_oom,
        folders=("data", "evaluation"),
    )
    load = partial(
        load_policy,
        config,
        tokenizer,
        longest=config.sft.max_seq_length,
        where="sft.max_seq_length",
    )
    result = run_training(config, context, load, tokenizer, rows, make_trainer)
    return replace(result, metrics={**figures(record), **result.metrics})
