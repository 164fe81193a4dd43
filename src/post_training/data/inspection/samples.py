"""Rows of a prepared dataset, made ready to be looked at: in a terminal, or as an HTML page.

    Sample (a row) -> Part (a piece of a sequence) -> Run (tokens of one kind and weight)

A token is shown as COMPLETION only if it is trained: the first of each part never is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.text import Text

from post_training.data.inspection.tokens import (
    Spelled,
    Stretch,
    Vocabulary,
    stretches_of_run,
    stretches_of_token,
)
from post_training.data.lengths import source_starts
from post_training.data.prepared.dataset import PreparedDataset, PreparedRow
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT

# How the kinds of tokens look in a terminal.
_COLOURS = {PROMPT: "dim", COMPLETION: "green", EXCLUDED: "yellow"}
_BRACKETS = {PROMPT: ("", ""), COMPLETION: ("⟦", "⟧"), EXCLUDED: ("⟪", "⟫")}
_STYLES = {"plain": "", "mark": "blue", "special": "bold"}
_LEGEND = {COMPLETION: b"trained", PROMPT: b"context", EXCLUDED: b"excluded from the loss"}


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind (rows.py) and weight in the loss."""

    kind: int
    weight: float
    tokens: tuple[Spelled, ...]


@dataclass(frozen=True)
class Part:
    """A piece of a sequence, in a row; or the prompt or an answer of a pair.

    sequence: its number within the source, from 1. start: of the part in it, in tokens. length: of
    the whole sequence, in tokens. what: it is a part of. note: what else is to be said of it.
    """

    source: str
    sequence: int
    start: int
    length: int
    runs: tuple[Run, ...]
    what: str = "sequence"
    note: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    @property
    def num_trained(self) -> int:
        return sum(len(run.tokens) for run in self.runs if run.kind == COMPLETION)

    def describe(self) -> str:
        """`sequence 17 of sums.jsonl: 12 tokens, 5 trained`, and which of them where it was cut."""
        text = f"{self.what} {self.sequence} of {self.source}: {self.num_tokens} tokens, "
        text += f"{self.num_trained} trained{self.note}"
        if self.num_tokens == self.length:
            return text
        end = self.start + self.num_tokens
        return f"{text} (tokens {self.start + 1} to {end} of {self.length})"


@dataclass(frozen=True)
class Sample:
    """A row and its parts. row: its number, from 1. num_pairs: in it, where it has pairs."""

    row: int
    parts: tuple[Part, ...]
    num_pairs: int = 0

    def describe(self) -> str:
        num_tokens = sum(part.num_tokens for part in self.parts)
        num_trained = sum(part.num_trained for part in self.parts)
        number, name = (
            (self.num_pairs or len(self.parts)),
            "pairs" if self.num_pairs else "sequences",
        )
        what = f"{number} {name}: " if number > 1 else ""
        return f"row {self.row}: {what}{num_tokens} tokens, {num_trained} trained"


def read_samples(
    dataset: PreparedDataset, vocabulary: Vocabulary, rows: Iterable[int]
) -> Iterator[Sample]:
    """The samples of these rows, numbered from 0.

    Errors: UsageError for an id that is not in the vocabulary.
    """
    starts = source_starts(dataset)
    names = [source["name"] for source in dataset.record["sources"]]
    for index in rows:
        row = dataset.read(index)
        pieces = dataset.pieces[dataset.offsets[index] : dataset.offsets[index + 1]].tolist()
        parts = []
        end = 0
        for number, start, length in pieces:
            begin, end = end, end + length
            source = int(np.searchsorted(starts, number, side="right")) - 1
            parts.append(
                Part(
                    source=names[source],
                    sequence=number - int(starts[source]) + 1,
                    start=start,
                    length=_whole_length(dataset, number),
                    runs=tuple(_piece_runs(row, begin, end, vocabulary)),
                )
            )
        yield Sample(index + 1, tuple(parts))


def _whole_length(dataset: PreparedDataset, number: int) -> int:
    for store in dataset.stores:
        if number < len(store):
            return int(store.tokens.lengths[number])
        number -= len(store)
    raise IndexError(f"no sequence {number}")


def _piece_runs(row: PreparedRow, begin: int, end: int, vocabulary: Vocabulary) -> Iterator[Run]:
    weights = [1.0] * (end - begin) if row.weights is None else row.weights[begin:end].tolist()
    ids, kinds = row.ids[begin:end].tolist(), row.kinds[begin:end].tolist()
    return runs_of(ids, kinds, weights, vocabulary, is_predicted=False)


def runs_of(
    ids: list[int],
    kinds: list[int],
    weights: list[float],
    vocabulary: Vocabulary,
    *,
    is_predicted: bool,
) -> Iterator[Run]:
    """Tokens as runs. is_predicted: whether something stands before the first of them, else it is
    never trained.

    Errors: UsageError for an id that is not in the vocabulary.
    """
    if kinds and kinds[0] == COMPLETION and not is_predicted:
        kinds = [PROMPT, *kinds[1:]]
    # What isn't trained has no weight worth showing.
    keys = [(k, w if k == COMPLETION else 1.0) for k, w in zip(kinds, weights, strict=True)]
    tokens = vocabulary.spell(ids)
    for (kind, weight), group in groupby(zip(keys, tokens, strict=True), key=lambda pair: pair[0]):
        yield Run(kind, weight, tuple(token for _, token in group))


def show(samples: Iterable[Sample], console: Console) -> None:
    """Samples in a terminal: each part as text, as tokens, and as ids.

    In colour where there is some; elsewhere (a file, a pipe, NO_COLOR) trained tokens stand in
    brackets. Nothing is folded by us, so that what is copied is what is there.
    """
    printer = _Printer(console)
    printer.legend()
    for sample in samples:
        printer.sample(sample)


class _Printer:
    def __init__(self, console: Console):
        self._console = console
        self._coloured = console.color_system is not None and not console.no_color

    def legend(self) -> None:
        line = Text()
        for kind, text in _LEGEND.items():
            run = Run(kind, 1.0, (Spelled(0, text, False),))
            self._append(line, run, [stretches_of_run(run.tokens)])
            line.append("  ")
        self._print(line)

    def sample(self, sample: Sample) -> None:
        self._print(Text(f"\n━━ {sample.describe()}", self._if_coloured("bold")))
        for part in sample.parts:
            self._print(Text(f"── {part.describe()}"))
            text, tokens, ids = Text(), Text(), Text()
            for run in part.runs:
                self._append(text, run, [stretches_of_run(run.tokens)])
                self._append(tokens, run, map(stretches_of_token, run.tokens), "│")
                self._append(ids, run, ([Stretch(str(token.id))] for token in run.tokens), " ")
            for view in (text, tokens, ids):
                self._print(view)

    def _append(
        self, line: Text, run: Run, groups: Iterable[Iterable[Stretch]], border: str = ""
    ) -> None:
        """border: after each group."""
        opening, closing = ("", "") if self._coloured else _BRACKETS[run.kind]
        line.append(opening + ("" if run.weight == 1 else f"×{run.weight:g} "))
        for stretches in groups:
            for stretch in stretches:
                style = f"{_COLOURS[run.kind]} {_STYLES[stretch.style]}"
                line.append(stretch.text, self._if_coloured(style))
            line.append(border, self._if_coloured("blue"))
        line.append(closing)

    def _if_coloured(self, style: str) -> str:
        return style if self._coloured else ""

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def page(samples: Iterable[Sample], title: str) -> str:
    """Samples as one HTML page (page.html.jinja, page.css)."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        samples=list(samples),
        text_of=lambda run: stretches_of_run(run.tokens),
        parts_of=stretches_of_token,
        ends_line=lambda token: token.content.endswith(b"\n"),
    )
