"""What the stages mix and split share: all good rows of the sources in one file, with counts."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.files import atomic_directory, remove_leftovers, write_json
from post_training.data.cleaning.cleaning import with_cleaning
from post_training.data.config import SourcesConfig
from post_training.data.formats.columns import ColumnReport, describe_columns
from post_training.data.reading import Reader, Verdicts, name_of, open_sources
from post_training.data.row_file import LineReader, RowFile, gather
from post_training.models.reference import common_reference
from post_training.stages.context import Progress, StageContext

_GATHERED = "gathered.jsonl"


@contextmanager
def gather_rows(
    context: StageContext,
    config: SourcesConfig,
    *,
    stratify_by: str | None = None,
    source_column: str | None = None,
) -> Iterator[tuple[RowFile, Path, dict[str, Any]]]:
    """Yield the rows, the dataset's folder, and its counts, to which more may be added.

    The folder becomes RUN/dataset when the block ends without an error, the counts its counts.json;
    the file of all rows is removed. Rejected rows go to RUN/rejects.jsonl.
    stratify_by, source_column: as in LineReader (data/row_file.py).
    Errors: UsageError for datasets of different formats, or with log-probabilities of different
    models, whose rows can't stand in one file.
    """
    remove_leftovers(context.run_dir, "dataset")
    target = context.run_dir / "dataset"
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    reference = common_reference(config.datasets)
    sources, formats = open_sources(config)
    names = tuple(name_of(dataset) for dataset in config.datasets)
    described = [found.describe() for found in formats]
    for name, words in zip(names, described, strict=True):
        context.log(f"data: {name} is read as {words}")
    if any(found != formats[0] for found in formats):
        pairs = "; ".join(": ".join(pair) for pair in zip(names, described, strict=True))
        raise UsageError(
            f"rows of different formats can't be in one file: {pairs}",
            where="data.datasets",
            hint="give one of them a transform, or let sft and prepare read them one by one",
        )
    reader = with_cleaning(Reader(config, formats), sources, context.run_dir, context.log)
    state = LineReader(reader, stratify_by, source_column, names)
    report = ColumnReport(formats)
    with (
        atomic_directory(target) as folder,
        Verdicts(config.on_error, context.run_dir / "rejects.jsonl") as verdicts,
    ):
        with Progress("row", None, shown=True) as progress:
            rows = gather(folder / _GATHERED, state, sources, verdicts, progress.update, report)
        counts: dict[str, Any] = {
            "sources": [
                {"name": name, **source}
                for name, source in zip(names, report.sources(rows.num_rows), strict=True)
            ],
            "rejected": verdicts.counts,
        }
        context.inputs.check()
        for source in counts["sources"]:
            for line in describe_columns(source, unread="kept, but not read by training"):
                context.log(f"data: {line}")
        yield rows, folder, counts
        rows.path.unlink()
        write_json(folder / "counts.json", counts)
        if reference is not None:
            reference.write(folder)
        if verdicts.counts:
            context.log(f"data: {verdicts.summary()}")
