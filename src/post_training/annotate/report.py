"""The report on what `select` chose: figures for report.json, and a table for the log.

The page of the run (post_training/report) shows report.json with histograms.
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from post_training.annotate.pairs import DROPPED, Selected
from post_training.data.rows import SIDES
from post_training.report.annotations import QUANTILES, describe_distribution, format_number

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
    """What became of all prompts; `add` is called for each.

    num_samples: to choose from; num_cut_off: of them, left out as they were cut off.
    num_truncated: of the chosen and of the rejected answers. dropped: prompts without a pair, by
    reason (a key of DROPPED). sources: pairs, by the dataset of the prompt.
    """

    num_prompts: int = 0
    num_pairs: int = 0
    num_samples: int = 0
    num_cut_off: int = 0
    num_truncated: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, int] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    _values: dict[str, array] = field(default_factory=dict)

    def add(self, selected: Selected) -> None:
        """Count what became of one prompt."""
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
            for side in SIDES:
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

    def describe_cut_off(self) -> str | None:
        """A sentence on the samples to choose from, if any was cut off; the truncated answers of
        pairs are among the figures."""
        if not self.num_cut_off:
            return None
        return (
            f"{self.num_samples:,} samples, {self.num_cut_off:,} cut off at max_tokens: left out "
            "(exclude_truncated)"
        )

    def describe_dropped(self) -> str:
        return _describe_dropped(self.dropped)

    def figures(self) -> dict[str, Any]:
        """All of it, as report.json has it."""
        return {
            "num_prompts": self.num_prompts,
            "num_pairs": self.num_pairs,
            "prompts_without_a_pair": self.dropped,
            "pairs_by_source": dict(sorted(self.sources.items())),
            "truncated": dict(self.num_truncated),
            "distributions": {
                name: describe_distribution(values) for name, values in sorted(self._values.items())
            },
        }


def _describe_dropped(dropped: dict[str, int]) -> str:
    return ", ".join(f"{number:,}: {DROPPED[key]}" for key, number in dropped.items())


def table_lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as lines for the log."""
    yield f"{figures['num_pairs']:,} pairs from {figures['num_prompts']:,} prompts"
    without = figures["prompts_without_a_pair"]
    if without:
        yield f"{sum(without.values()):,} prompts without a pair: {_describe_dropped(without)}"
    distributions = figures["distributions"]
    width = max(map(len, distributions))
    columns = ["number", "mean", *QUANTILES]
    yield " ".join([" " * width, *(f"{column:>9}" for column in columns)])
    for name, found in distributions.items():
        yield " ".join(
            [f"{name:<{width}}", *(f"{format_number(found[each]):>9}" for each in columns)]
        )
