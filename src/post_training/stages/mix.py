"""Write `RUN/dataset/rows.jsonl`: rows of all datasets as they are, in the mixture's order."""

import numpy as np

from post_training.data.prepared.mixture import choose_rows
from post_training.stages.config import MixConfig
from post_training.stages.context import Result, StageContext
from post_training.stages.row_datasets import gather_rows

ROWS = "rows.jsonl"


def run(config: MixConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _mix(config, context))
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics)


def _mix(config: MixConfig, context: StageContext) -> dict[str, float]:
    with gather_rows(context, config.data, source_column=config.source_column) as gathered:
        rows, folder, counts = gathered
        chosen = choose_rows(config.data.datasets, rows.num_rows, config.seed)
        rows.copy(chosen, folder / ROWS)
        used = np.bincount(rows.dataset[chosen], minlength=len(rows.num_rows)).tolist()
        for source, number in zip(counts["sources"], used, strict=True):
            source["num_used"] = number
            context.log(f"data: {source['name']}: {number:,} of {source['num_rows']:,} rows")
    return {"num_rows": len(chosen), "num_rejected": sum(counts["rejected"].values())}
