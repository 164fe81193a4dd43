"""Choose pairs among the branches of rows: `RUN/dataset/pairs.jsonl` and `RUN/report/report.json`.

RUN/dataset/pairs.jsonl      preference rows (pairs.py)
            reference.json   whose log-probabilities they hold, if anybody's
            counts.json      pairs and prompts; what was read, dropped and rejected
RUN/report/report.json       figures of the pairs (report.py)

Prompts are done by worker processes, and pairs written in the prompts' order: the same bytes for
any number of workers.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.annotate.config import SelectConfig
from post_training.annotate.pairs import Selected, select_pairs
from post_training.annotate.report import Report, table_lines
from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, remove_leftovers, write_json
from post_training.data.branches import BRANCHES, ID, branch_row
from post_training.data.cleaning.cleaning import with_cleaning
from post_training.data.formats.columns import ColumnReport, describe_columns
from post_training.data.reading import (
    Reader,
    Rejected,
    Verdicts,
    name_of,
    open_sources,
    read_chunks,
)
from post_training.data.rows import BadRow
from post_training.data.sources import Chunk
from post_training.data.sources.json_rows import json_line
from post_training.models.reference import common_reference
from post_training.stages.context import Progress, Result, StageContext

PAIRS = "pairs.jsonl"
# What select itself reads of a row and its branches (pairs.py).
_READ = {
    ID: "id",
    "dataset_source": "source",
    "prompt_token_ids": "figure",
    **{
        f"{BRANCHES}[].{name}": "figure"
        for name in (
            *("rewards", "finish_reason", "completion_length", "completion_ref_logprob"),
            *("prompt_token_ids", "completion_token_ids"),
        )
    },
}
REPORT = "report/report.json"


def run(config: SelectConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _select(config, context))
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics, state_files=[REPORT])


def _select(config: SelectConfig, context: StageContext) -> dict[str, Any]:
    remove_leftovers(context.run_dir, "dataset", "report")
    for name in ("dataset", "report"):
        shutil.rmtree(context.run_dir / name, ignore_errors=True)  # of an attempt that was killed
    reference = common_reference(config.data.datasets)
    report = Report()
    with (
        atomic_directory(context.run_dir / "dataset") as folder,
        Verdicts(config.data.on_error, context.run_dir / "rejects.jsonl") as verdicts,
    ):
        sources = _write_pairs(folder / PAIRS, config, report, verdicts, context)
        context.inputs.check()
        cut_off = report.describe_cut_off()
        if not report.num_pairs:
            raise PostTrainingError(
                f"not one pair from {report.num_prompts} prompts: {report.describe_dropped()}",
                where="strategy",
                hint=cut_off
                and f"{cut_off}; sample with a larger "
                "sampling.max_tokens, or set exclude_truncated: false",
            )
        if reference is not None:
            reference.write(folder)
        counts = {"num_pairs": report.num_pairs, "num_prompts": report.num_prompts}
        counts |= {"sources": sources, "dropped": report.dropped, "rejected": verdicts.counts}
        write_json(folder / "counts.json", counts)
    with atomic_directory(context.run_dir / "report") as folder:
        figures = report.figures()
        write_json(folder / "report.json", figures)
    for line in table_lines(figures):
        context.log(line)
    if cut_off:
        context.log(cut_off)
    if verdicts.counts:
        context.log(f"data: {verdicts.summary()}")
    return {
        "num_pairs": report.num_pairs,
        "num_prompts": report.num_prompts,
        "num_prompts_without": sum(report.dropped.values()),
        "num_rejected": sum(verdicts.counts.values()),
    }


def _write_pairs(
    path: Path, config: SelectConfig, report: Report, verdicts: Verdicts, context: StageContext
) -> list[dict[str, Any]]:
    """Write the pairs of every prompt, in the order of the inputs. Returned: what was read of each
    dataset's rows; no file's name, which decides no bytes."""
    sources, formats = open_sources(config.data, for_training=False)
    names = tuple(name_of(dataset) for dataset in config.data.datasets)
    for name, found in zip(names, formats, strict=True):
        context.log(f"data: {name} is read as {found.describe()}")
    reader = Reader(config.data, formats, for_training=False)
    reader = with_cleaning(reader, sources, context.run_dir, context.log)
    state = _Selection(reader, names, config)
    columns = ColumnReport(formats, _READ)
    num_rows = [0] * len(sources)
    with open(path, "wb") as file, Progress("prompt", None, shown=True) as progress:
        for chunk in read_chunks(
            _select_chunk, state, sources, config.data, num_rows.__getitem__, columns
        ):
            for rejected in chunk.rejected:
                verdicts.reject(rejected.place, rejected.bad, rejected.raw)
            for selected in chunk.selected:
                if config.data.debug_subsample == num_rows[chunk.dataset]:
                    break
                num_rows[chunk.dataset] += 1
                report.add(selected)
                if not isinstance(selected.pairs, str):
                    file.write(b"".join(map(json_line, selected.pairs)))
            progress.update(report.num_prompts, f"{report.num_pairs:,} pairs")
    told = columns.sources(num_rows)
    for name, source in zip(names, told, strict=True):
        for line in describe_columns({"name": name, **source}):
            context.log(f"data: {line}")
    return told


@dataclass(frozen=True)
class _Selection:
    reader: Reader
    names: tuple[str, ...]
    config: SelectConfig


@dataclass(frozen=True)
class _Selected:
    """selected: of each prompt."""

    dataset: int
    selected: list[Selected]
    rejected: list[Rejected]


def _select_chunk(state: _Selection, item: tuple[int, Chunk]) -> _Selected:
    dataset, chunk = item
    result = _Selected(dataset, [], [])
    for record in state.reader.records(chunk, dataset):
        try:
            for value in state.reader.values(record, dataset):
                row = branch_row(value, state.reader.formats[dataset], state.names[dataset])
                result.selected.append(select_pairs(row, state.config))
        except BadRow as bad:
            result.rejected.append(Rejected(record.place, bad, record.raw))
    return result
