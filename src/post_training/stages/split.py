"""Write `RUN/dataset/train.jsonl` and `eval.jsonl`: each row in exactly one of them, as it is, in
the order of the sources."""

import numpy as np

from post_training.data.order import choose_evaluation_rows
from post_training.stages.config import SplitConfig
from post_training.stages.context import Result, StageContext
from post_training.stages.row_datasets import gather_rows

TRAIN, EVAL = "train.jsonl", "eval.jsonl"


def run(config: SplitConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _split(config, context))
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics)


def _split(config: SplitConfig, context: StageContext) -> dict[str, float]:
    with gather_rows(context, config.data, stratify_by=config.stratify_by) as gathered:
        rows, folder, counts = gathered
        strata = rows.dataset if config.stratify_by is None else rows.stratum
        chosen = choose_evaluation_rows(strata, config.eval_size, config.seed)
        rest = np.setdiff1d(np.arange(len(strata)), chosen, assume_unique=True)
        rows.copy(rest, folder / TRAIN)
        rows.copy(chosen, folder / EVAL)
        metrics = {"num_train_rows": len(rest), "num_eval_rows": len(chosen)}
        counts |= {**metrics, "num_strata": len(np.unique(strata))}
        context.log(f"data: {len(rest):,} rows to train on, {len(chosen):,} to evaluate on")
    return {**metrics, "num_rejected": sum(counts["rejected"].values())}
