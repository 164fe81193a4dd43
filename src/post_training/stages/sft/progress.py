"""How far training is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType

_LINE_INTERVAL_S = 30.0


class Progress:
    """Shown only where `shown` is set (rank 0). The first and the last line are always written."""

    def __init__(self, total: int, *, shown: bool):
        self.total = total
        self._lines = shown and not sys.stderr.isatty()
        self._next_line_at = 0.0
        self._bar = _bar(total) if shown and not self._lines else None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        figures = f"loss {loss:.4f} · {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif self._lines:
            now = time.monotonic()
            if now >= self._next_line_at or step == self.total:
                self._next_line_at = now + _LINE_INTERVAL_S
                print(f"step {step}/{self.total} · {figures}", file=sys.stderr, flush=True)


def _bar(total: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("train", total=total, figures="")
    return bar
