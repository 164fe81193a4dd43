"""How far a piece of work is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType

_FIRST_LINE_S = 2.0
_LINE_INTERVAL_S = 30.0


class Progress:
    """`total` pieces of `what`; None where their number isn't known. Silent unless `shown`."""

    def __init__(self, what: str, total: int | None, *, shown: bool):
        self.what = what
        self.total = total
        self._lines = shown and not sys.stderr.isatty()
        self._next_line_at = time.monotonic() + _FIRST_LINE_S
        self._bar = _bar(what, total) if shown and not self._lines else None

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

    def update(self, done: int, figures: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=figures)
        elif self._lines:
            now = time.monotonic()
            if now >= self._next_line_at or done == self.total:
                self._next_line_at = now + _LINE_INTERVAL_S
                count = f"{done:,}" if self.total is None else f"{done}/{self.total}"
                print(" · ".join(filter(None, (f"{self.what} {count}", figures))), file=sys.stderr)
                sys.stderr.flush()


def _bar(what: str, total: int | None):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task(what, total=total, figures="")
    return bar
