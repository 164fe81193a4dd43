"""Write `RUN/dataset/pairs.jsonl`, whose logprobs those are, and `RUN/report/`.

Prompts are done by worker processes, and pairs written in the prompts' order: the same bytes for
any number of workers.
"""

import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.annotate.config import SelectConfig
from post_training.annotate.pairs import DROPPED, Selected, select_pairs
from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, write_json
from post_training.data.branches import BRANCHES, ID, branch_row
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
from post_training.stages.context import Progress, Result, StageContext, remove_leftovers

# What was selected, as figures, a table and a page with histograms.
#
# A distribution is told by its mean and its quantiles (the nearest rank: a value that is there),
# and by a histogram of 20 equal bins between its least and its largest value.


_QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95,
              "largest": 1.0}  # fmt: skip
_NUM_BINS = 20
# {figure: the columns of a pair that it is of}; a margin is chosen minus rejected.
_COLUMNS = {
    "reward, chosen": "chosen_reward",
    "reward, rejected": "rejected_reward",
    "quantile reward, chosen": "chosen_quantile_reward",
    "quantile reward, rejected": "rejected_quantile_reward",
    "length in tokens, chosen": "chosen_length",
    "length in tokens, rejected": "rejected_length",
    "reference logprob, chosen": "ref_chosen_logprob",
    "reference logprob, rejected": "ref_rejected_logprob",
}
_MARGINS = {"margin of the rewards": "{}_reward", "margin of the lengths": "{}_length"}


@dataclass
class Report:
    num_prompts: int = 0
    num_pairs: int = 0
    num_samples: int = 0
    num_cut_off: int = 0
    num_truncated: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, int] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    _values: dict[str, array] = field(default_factory=dict)

    def add(self, selected: Selected) -> None:
        """What became of one prompt."""
        self.num_prompts += 1
        self.num_samples += selected.num_samples
        self.num_cut_off += selected.num_cut_off
        pairs = selected.pairs
        if isinstance(pairs, str):
            self.dropped[pairs] = self.dropped.get(pairs, 0) + 1
            return
        self._keep("reward, reference samples", *pairs[0].get("ref_rewards", ()))
        for row in pairs:
            self.num_pairs += 1
            self.sources[str(row["source"])] += 1
            for side in ("chosen", "rejected"):
                self.num_truncated[side] += row[f"{side}_is_truncated"]
            for name, column in _COLUMNS.items():
                if column in row:
                    self._keep(name, row[column])
            for name, column in _MARGINS.items():
                columns = column.format("chosen"), column.format("rejected")
                if all(each in row for each in columns):
                    self._keep(name, row[columns[0]] - row[columns[1]])

    def _keep(self, name: str, *values: float) -> None:
        if values:
            self._values.setdefault(name, array("d")).extend(values)

    def cut_off(self) -> str | None:
        """Of the samples to choose from; the pairs have their own figures."""
        if not self.num_cut_off:
            return None
        return (
            f"{self.num_samples:,} samples, {self.num_cut_off:,} cut off at max_tokens: left out "
            "(exclude_truncated)"
        )

    def reasons(self) -> str:
        return _reasons(self.dropped)

    def figures(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "num_pairs": self.num_pairs,
            "prompts_without_a_pair": self.dropped,
            "pairs_by_source": dict(sorted(self.sources.items())),
            "truncated": dict(self.num_truncated),
            "distributions": {
                name: distribution(values) for name, values in sorted(self._values.items())
            },
        }

    def page(self) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        figures = self.figures()
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.jinja").render(
            figures=figures, reasons=DROPPED, quantiles=list(_QUANTILES), shown=shown
        )


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{number:,}: {DROPPED[key]}" for key, number in dropped.items())


def distribution(values: array) -> dict[str, Any]:
    """number, mean, the quantiles, and histogram: {from, to, counts of the bins}."""
    ordered = sorted(values)
    last = len(ordered) - 1
    quantiles = {name: ordered[round(share * last)] for name, share in _QUANTILES.items()}
    least, largest = ordered[0], ordered[-1]
    width = (largest - least) / _NUM_BINS
    counts = [0] * _NUM_BINS
    for value in ordered:
        counts[min(int((value - least) / width), _NUM_BINS - 1) if width else 0] += 1
    return {
        "number": len(ordered),
        "mean": sum(ordered) / len(ordered),
        **quantiles,
        "histogram": {"from": least, "to": largest, "counts": counts},
    }


def table(figures: dict[str, Any]) -> Iterator[str]:
    """For the log."""
    yield f"{figures['num_pairs']:,} pairs from {figures['num_prompts']:,} prompts"
    without = figures["prompts_without_a_pair"]
    if without:
        yield f"{sum(without.values()):,} prompts without a pair: {_reasons(without)}"
    distributions = figures["distributions"]
    width = max(map(len, distributions))
    columns = ["number", "mean", *_QUANTILES]
    yield " ".join([" " * width, *(f"{column:>9}" for column in columns)])
    for name, found in distributions.items():
        yield " ".join([f"{name:<{width}}", *(f"{shown(found[each]):>9}" for each in columns)])


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# Write `RUN/dataset/pairs.jsonl`, whose logprobs those are, and `RUN/report/`.


PAIRS = "pairs.jsonl"
# What select itself reads of a row and its branches (pairs.py, candidates.py).
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
REPORT = ("report/report.json", "report/report.html")


def run(config: SelectConfig, context: StageContext) -> Result:
    metrics = context.on_writer(lambda: _select(config, context))
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics, state_files=list(REPORT))


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
        if not report.num_pairs:
            raise PostTrainingError(
                f"not one pair from {report.num_prompts} prompts: {report.reasons()}",
                where="strategy",
                hint=report.cut_off()
                and f"{report.cut_off()}; sample with a larger "
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
        (folder / "report.html").write_text(report.page(), encoding="utf-8")
    for line in table(figures):
        context.log(line)
    if report.cut_off():
        context.log(report.cut_off())
    if verdicts.counts:
        context.log(f"data: {verdicts.summary()}")
    return {
        "num_pairs": report.num_pairs,
        "num_prompts": report.num_prompts,
        "num_prompts_without": sum(report.dropped.values()),
        "num_rejected": sum(verdicts.counts.values()),
    }


def _write_pairs(
    path: Any, config: SelectConfig, report: Report, verdicts: Verdicts, context: StageContext
) -> list[dict[str, Any]]:
    """What was read of each dataset's rows; no file's name, which decides no bytes."""
    sources, formats = open_sources(config.data, for_training=False)
    names = tuple(name_of(dataset) for dataset in config.data.datasets)
    for name, found in zip(names, formats, strict=True):
        context.log(f"data: {name} is read as {found.describe()}")
    state = _Selection(Reader(config.data, formats, for_training=False), names, config)
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
