"""What becomes of a bad row, and how many there were.

    fail: the first one ends the work · skip: it is left out · quarantine: and kept in a file

The rejects file has a JSON object a line: file, line, byte, reason, problem, a hint where a setting
decides, and the row itself as `raw` (`raw_base64` where it is not UTF-8), so that it can be mended
and read again.
"""

import base64
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from post_training.core.errors import PostTrainingError
from post_training.data.rows import REASONS, BadRow, Place

# Asked for by a setting: overlong: drop, a transform that returns None, …
MEANT = ("too-long", "filtered", "truncated")


class Verdicts:
    """A context manager that counts bad rows by reason; rejects_path: for quarantine only."""

    def __init__(self, on_error: Literal["fail", "skip", "quarantine"], rejects_path: Path):
        self.on_error = on_error
        self.counts: dict[str, int] = {}
        self._path = rejects_path
        self._file: IO[str] | None = None

    def __enter__(self) -> "Verdicts":
        if self.on_error == "quarantine":
            self._file = open(self._path, "w", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def reject(self, place: Place, bad: BadRow, raw: bytes) -> None:
        """Errors: PostTrainingError under `fail`, unless the row was meant to be left out."""
        if is_fatal(bad, self.on_error):
            raise refusal(place, bad)
        self.count(bad.reason)
        if self._file is not None:
            self._file.write(json.dumps(_entry(place, bad, raw), ensure_ascii=False) + "\n")

    def count(self, reason: str, number: int = 1) -> None:
        assert reason in REASONS
        self.counts[reason] = self.counts.get(reason, 0) + number

    def summary(self) -> str:
        """`3 rows left out: 2 malformed, 1 empty`, or nothing."""
        if not self.counts:
            return ""
        total = sum(self.counts.values())
        return f"{total:,} row{'s' if total > 1 else ''} left out: {counted(self.counts)}"

    def nothing_left(self, what: str) -> PostTrainingError:
        """The error where no row is left to be made a `what`."""
        hint = None
        if "truncated" in self.counts:
            hint = "an answer was cut off, here or when it was sampled (sampling.max_tokens): "
            hint += "set truncated_completions: train, or sample and allow longer ones"
        problem = f"no {what} to train on: {self.summary() or 'there is none'}"
        return PostTrainingError(problem, hint=hint)


def counted(counts: dict[str, int]) -> str:
    """`2 malformed, 1 truncated (truncated_completions: drop)`."""
    settings = {"truncated": " (truncated_completions: drop)"}
    return ", ".join(f"{n:,} {reason}{settings.get(reason, '')}" for reason, n in counts.items())


def is_fatal(bad: BadRow, on_error: str) -> bool:
    return on_error == "fail" and bad.reason not in MEANT


def refusal(place: Place, bad: BadRow) -> PostTrainingError:
    """The error of a row that ends the work."""
    how = f"{bad.hint};" if bad.hint else "mend the row,"
    hint = f"{how} or leave bad rows out: on_error: skip, or quarantine"
    return PostTrainingError(bad.problem, where=str(place), hint=hint)


def _entry(place: Place, bad: BadRow, raw: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"file": place.path, "line": place.number, "byte": place.byte}
    entry |= {"reason": bad.reason, "problem": bad.problem}
    if bad.hint is not None:
        entry["hint"] = bad.hint
    try:
        return entry | {"raw": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return entry | {"raw_base64": base64.b64encode(raw).decode()}
