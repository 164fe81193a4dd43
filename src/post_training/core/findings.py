"""What a self-check found, one line each, in words that say what to do."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TextIO

from post_training.core.errors import PostTrainingError

Status = Literal["ok", "note", "wrong"]
_MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


@dataclass(frozen=True)
class Finding:
    """note: worth knowing, and right or wrong as the user means it. hint: what mends it."""

    subject: str
    status: Status
    text: str
    hint: str | None = None


def ok(subject: str, text: str) -> Finding:
    return Finding(subject, "ok", text)


def note(subject: str, text: str, hint: str | None = None) -> Finding:
    return Finding(subject, "note", text, hint)


def wrong(subject: str, text: str, hint: str | None = None) -> Finding:
    return Finding(subject, "wrong", text, hint)


def examine(subject: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What `look` finds; an error of the user's or of the system is a finding too."""
    try:
        return list(look())
    except PostTrainingError as error:
        place = f"{error.where}: " if error.where else ""
        first, *more = error.problem.splitlines()
        # Of a program that failed: which one, and its last word.
        text = f"{first}: {more[-1].strip()}" if more else first
        return [wrong(subject, place + text, error.hint)]
    except OSError as error:
        return [wrong(subject, f"{error.filename}: {(error.strerror or str(error)).lower()}")]


def print_findings(findings: Iterable[Finding], stream: TextIO | None = None) -> int:
    """Print them and return the exit code: 1 when something is wrong."""
    stream = stream or sys.stdout
    num_wrong = 0
    for finding in findings:
        num_wrong += finding.status == "wrong"
        print(f"{_MARKS[finding.status]}  {finding.subject:12}  {finding.text}", file=stream)
        if finding.hint:
            print(f"{'':21}hint: {finding.hint}", file=stream)
    print(f"{num_wrong} wrong" if num_wrong else "nothing is wrong", file=stream)
    return 1 if num_wrong else 0
