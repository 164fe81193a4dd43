"""metrics.jsonl as the series of charts.

A line of figures belongs to one of two axes: `train`, or `eval` for an evaluation. Of a long run
not every line is drawn: of each bucket of lines, the ones with the least and the largest loss, so
that no spike is lost.
"""

import json
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from post_training.core.errors import tell
from post_training.records.run_record import METRICS_NAME

# Of each axis.
MOST_POINTS = 4000
_AXIS_FIGURES = ("epoch", "num_rows", "num_sequences", "num_tokens", "num_trained_tokens")
_GIB = 1 << 30
_BLOCKS = "▁▂▃▄▅▆▇█"
# {figure: (chart, what the series is called in it)}; any other figure has a chart of its own, or
# one with those of the same prefix (`logps/chosen`, `logps/rejected`).
_PLACES = {
    "loss": ("Loss", "loss"),
    "completion_loss": ("Loss", "loss of completions"),
    "prompt_loss": ("Loss", "loss of prompts"),
    "rewards/chosen": ("Implicit rewards", "chosen"),
    "rewards/rejected": ("Implicit rewards", "rejected"),
    "rewards/margins": ("Reward margin, chosen minus rejected", "margin"),
    "rewards/accuracies": ("Accuracy: chosen above rejected", "accuracy"),
    "kl": ("KL divergence from the reference", "both answers"),
    "kl/chosen": ("KL divergence from the reference", "chosen"),
    "kl/rejected": ("KL divergence from the reference", "rejected"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm before clipping", "gradient norm"),
    "timing.tokens_per_s": ("Speed (tokens/s)", "all tokens"),
    "timing.trained_tokens_per_s": ("Speed (tokens/s)", "trained tokens"),
    "timing.mfu": ("Model FLOPs utilisation", "MFU"),
    "timing.peak_memory_bytes": ("Peak memory (GiB)", "peak memory"),
    "timing.step_s": ("Time of a step (s)", "step"),
}
# Before all others, and after them.
_FIRST = ("Loss", "Implicit rewards", "Reward margin, chosen minus rejected")
_LAST = (
    "Learning rate",
    "Gradient norm before clipping",
    "Speed (tokens/s)",
    "Time of a step (s)",
    "Model FLOPs utilisation",
    "Peak memory (GiB)",
)


@dataclass
class Axis:
    """steps, tokens: of each line that is drawn. figures: {name: a value a line, None where a line
    has none}; bytes are told in GiB."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int | None] = field(default_factory=list)
    figures: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Curves:
    """axes: `train` and `eval`. num_lines: in the file; num_drawn: of them. num_damaged: lines that
    are no figures, which are left out."""

    axes: dict[str, Axis]
    num_lines: int
    num_drawn: int
    num_damaged: int


def read_curves(run_dir: Path) -> Curves | None:
    """None where the run has no line of figures (yet)."""
    try:
        texts = (run_dir / METRICS_NAME).read_bytes().splitlines()
    except FileNotFoundError:
        return None
    lines = [line for text in texts if (line := _figures(text))]
    if not lines:
        return None
    num_damaged = len(texts) - len(lines)
    if num_damaged > 1:  # The last line of a run that is at work may be half written.
        tell(f"warning: {run_dir / METRICS_NAME}: {num_damaged} lines are no figures: left out")
    axes = {"train": Axis(), "eval": Axis()}
    of_axis: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    num_tokens: int | None = None
    for line in lines:
        num_tokens = line.get("num_tokens", num_tokens)
        of_axis["eval" if "eval" in line else "train"].append({**line, "num_tokens": num_tokens})
    num_drawn = 0
    for name, axis in axes.items():
        for line in _thinned(of_axis[name]):
            _add(axis, line)
            num_drawn += 1
    return Curves(axes, len(lines), num_drawn, num_damaged)


def read_losses(run_dir: Path, most: int = 16) -> list[float]:
    """The training loss of lines evenly spaced over the run, the last one too: for a small plot.

    Only these lines are parsed: a folder may have thousands of runs.
    """
    try:
        texts = (run_dir / METRICS_NAME).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    last = len(texts) - 1
    wanted = sorted({round(index * last / max(1, most - 1)) for index in range(most)})
    lines = [_figures(texts[index]) for index in wanted] if texts else []
    losses = [line.get("loss") for line in lines if line]
    return [loss for loss in losses if isinstance(loss, int | float) and isfinite(loss)]


def sparkline(values: list[float]) -> str:
    """`█▆▅▃▂▁`: each value between the least and the largest."""
    if len(values) < 2:
        return ""
    least, span = min(values), max(values) - min(values)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(top * (value - least) / span) if span else 0] for value in values)


def _figures(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_whole = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if is_whole else None


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS of the lines, in order; the first and the last are among them."""
    if len(lines) <= MOST_POINTS:
        return lines
    size = -(-2 * len(lines) // (MOST_POINTS - 2))
    kept = {0, len(lines) - 1}
    for start in range(0, len(lines), size):
        bucket = range(start, min(start + size, len(lines)))
        kept |= {min(bucket, key=lambda i: _loss(lines[i]))}
        kept |= {max(bucket, key=lambda i: _loss(lines[i]))}
    return [lines[index] for index in sorted(kept)]


def _loss(line: dict[str, Any]) -> float:
    value = line.get("eval", line).get("loss", 0.0)
    return value if isinstance(value, int | float) and isfinite(value) else 0.0


def _add(axis: Axis, line: dict[str, Any]) -> None:
    values = line["eval"] if isinstance(line.get("eval"), dict) else line
    figures = {
        key: value
        for key, value in values.items()
        if key not in ("step", "timing", "eval", *_AXIS_FIGURES)
    }
    if values is line:
        timing = line.get("timing", {})
        figures |= {f"timing.{key}": value for key, value in timing.items()}
    for name, value in figures.items():
        if name not in axis.figures and isinstance(value, int | float):
            axis.figures[name] = [None] * len(axis.steps)
    axis.steps.append(line["step"])
    axis.tokens.append(line["num_tokens"])
    for name, column in axis.figures.items():
        value = figures.get(name)
        if not isinstance(value, int | float) or not isfinite(value):
            value = None
        elif name.endswith("_bytes"):
            value = round(value / _GIB, 4)
        column.append(value)


@dataclass(frozen=True)
class Series:
    """One line in a chart. run: the number of its run. axis: `train` or `eval`."""

    run: int
    axis: str
    name: str
    values: list[float | None]


@dataclass(frozen=True)
class Chart:
    title: str
    series: list[Series]


def make_charts(runs: list[Curves | None]) -> list[Chart]:
    """Every figure of the runs, those of a kind in one chart, the runs laid over each other."""
    charts: dict[str, list[Series]] = {}
    for number, curves in enumerate(runs):
        for axis_name, axis in curves.axes.items() if curves else ():
            for name, values in axis.figures.items():
                title, label = _place(name)
                if axis_name == "eval":
                    label = f"{label}, held out"
                charts.setdefault(title, []).append(Series(number, axis_name, label, values))
    order = {title: -len(_FIRST) + index for index, title in enumerate(_FIRST)}
    order |= {title: 1 + index for index, title in enumerate(_LAST)}
    return [
        Chart(title, series)
        for title, series in sorted(charts.items(), key=lambda item: order.get(item[0], 0))
    ]


def _place(name: str) -> tuple[str, str]:
    """The chart of a figure, and what it is called there."""
    if name in _PLACES:
        return _PLACES[name]
    name = name.removeprefix("timing.")
    if name.endswith("_bytes"):
        return f"{_words(name.removesuffix('_bytes'))} (GiB)", _words(name)
    parts = name.split("/")
    if parts[0] == "sources" and len(parts) == 3:
        return f"{_words(parts[2])} of each dataset", parts[1]
    if len(parts) > 1:
        return _words(parts[0]), _words("/".join(parts[1:]))
    return _words(name), _words(name)


def _words(name: str) -> str:
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]
