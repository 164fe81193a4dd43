"""Prepare the data, train, write `RUN/model`.

RUN/data/          rows.arrow, counts.json: token ids and labels
RUN/checkpoints/   checkpoint-N: weights, optimizer, schedule, random states, totals
RUN/metrics.jsonl  one line each logging_steps
RUN/model/         the result, loadable by plain transformers
"""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.data.chat_templates import ChatTemplate, choose_template
from post_training.data.conversations import read_conversations
from post_training.data.prepared import Counts, read_counts, write_prepared
from post_training.data.tokenize import TokenizedRow, tokenize
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.sft.config import SftConfig, accumulation_steps
from post_training.stages.sft.progress import Progress


def run(config: SftConfig, context: StageContext) -> Result:
    try:
        num_accumulated = accumulation_steps(config.training, context.ranks.world_size)
    except ValueError as error:
        raise UsageError(str(error), where="training") from None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    quiet_libraries(context.run_dir / "cache")
    from post_training.models.load import load_tokenizer
    from post_training.stages.sft.training import train

    context.on_writer(lambda: _remove_leftovers(context.run_dir))
    tokenizer = load_tokenizer(config.model.path)
    template = choose_template(config.data.chat_template, tokenizer)
    counts = context.on_writer(lambda: _prepare(config, context, tokenizer, template))
    return train(config, context, tokenizer, template, counts, num_accumulated)


def _prepare(
    config: SftConfig, context: StageContext, tokenizer: object, template: ChatTemplate
) -> Counts:
    folder = context.run_dir / "data"
    if folder.exists():  # complete, or it wouldn't be there
        return read_counts(folder)
    started_at = time.monotonic()
    rows = tokenize(
        read_conversations(config.data.datasets), tokenizer, template, config.sft.max_seq_length
    )
    with Progress("row", None, shown=True) as progress:
        counts = write_prepared(folder, _counted(rows, progress))
    context.log(
        f"data: {counts.num_rows:,} rows, {counts.num_tokens:,} tokens, "
        f"{counts.num_trained_tokens:,} of them trained, "
        f"{counts.num_truncated_rows:,} rows truncated to {config.sft.max_seq_length} tokens "
        f"({time.monotonic() - started_at:.1f} s)"
    )
    return counts


def _counted(rows: Iterable[TokenizedRow], progress: Progress) -> Iterator[TokenizedRow]:
    for number, row in enumerate(rows, start=1):
        yield row
        if number % 500 == 0:
            progress.update(number)


def _remove_leftovers(run_dir: Path) -> None:
    """What a killed attempt was writing beside its place (core/files.py)."""
    for name in ("data", "model", "metrics.jsonl"):
        for leftover in run_dir.glob(f".{name}.*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
