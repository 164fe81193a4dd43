"""Counts as text for a terminal: a table of the sources, and the lengths as bars."""

from collections.abc import Iterator, Sequence

from post_training.data.lengths import Bin, Figures

_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLUMNS = (
    *("sequences", "tokens", "trained", "mean", "median", "p95", "p99", "longest"),
    "generation ratio",
)


def table_lines(figures: Sequence[Figures]) -> Iterator[str]:
    """Numbers are aligned below their titles."""
    cells = [("source", *_COLUMNS), *((each.name, *_values(each)) for each in figures)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *numbers in cells:
        aligned = (f"{text:>{width}}" for text, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([f"{name:{widths[0]}}", *aligned])


def histogram_lines(bins: Sequence[Bin]) -> Iterator[str]:
    yield "sequences by length, in tokens"
    most = max(each.num_sequences for each in bins)
    lengths = [f"{each.start:,} to {each.end - 1:,}" for each in bins]
    width = max(map(len, lengths))
    count_width = len(f"{most:,}")
    for text, each in zip(lengths, bins, strict=True):
        bar = _bar(each.num_sequences / most)
        yield f"{text:>{width}}  {each.num_sequences:{count_width},}  {bar}".rstrip()


def _values(figures: Figures) -> Iterator[str]:
    yield f"{figures.num_sequences:,}"
    yield f"{figures.num_tokens:,}"
    yield f"{figures.num_trained_tokens:,}"
    yield f"{figures.mean:,.1f}"
    for length in (figures.median, figures.p95, figures.p99, figures.longest):
        yield f"{length:,}"
    yield "-" if figures.generation_ratio is None else f"{figures.generation_ratio:.3f}"


def _bar(share: float) -> str:
    """At least an eighth where there is anything."""
    eighths = max(round(share * _BAR_WIDTH * 8), 1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
