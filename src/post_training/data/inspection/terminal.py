"""Samples in a terminal: each part as text, as tokens, and as ids.

In colour where there is some; elsewhere (a file, a pipe, NO_COLOR) trained tokens stand in
brackets. Nothing is folded by us, so that what is copied is what is there.
"""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from post_training.data.inspection.samples import Run, Sample
from post_training.data.inspection.visible import Stretch, stretches_of_run, stretches_of_token
from post_training.data.inspection.vocabulary import Spelled
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT

_COLOURS = {PROMPT: "dim", COMPLETION: "green", EXCLUDED: "yellow"}
_BRACKETS = {PROMPT: ("", ""), COMPLETION: ("⟦", "⟧"), EXCLUDED: ("⟪", "⟫")}
_STYLES = {"plain": "", "mark": "blue", "special": "bold"}
_LEGEND = {COMPLETION: b"trained", PROMPT: b"context", EXCLUDED: b"excluded from the loss"}


def show(samples: Iterable[Sample], console: Console) -> None:
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
