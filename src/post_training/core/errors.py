"""One tree of errors, and the one way they are shown.

Everything a user can cause is a PostTrainingError: it says what is wrong, where, and what to do.
Any other exception is a bug of ours and keeps its traceback. `dotted` and `shown` spell the keys
and the values in messages; `first_line` is what a library's error says; `length_in_common` finds
where two texts differ.
"""

import argparse
import errno
import os
import sys
from itertools import takewhile
from typing import Any, NoReturn, TextIO


class PostTrainingError(Exception):
    """A failure with one clear message. `exit_code` 1: the work failed.

    problem: what is wrong, lower case, with the offending value and the limit.
    where: file, `file:line`, key or digest it concerns.
    hint: the one thing to do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, *, where: str | None = None, hint: str | None = None):
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{text}\nhint: {self.hint}" if self.hint else text


class NoAnswerError(PostTrainingError):
    """A program gave no answer in time and was killed. It may have done what it was asked for."""


class UsageError(PostTrainingError):
    """The command or its configuration is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """Every fault of a configuration at once, one line each."""

    def __init__(self, faults: list[str], *, hint: str | None = None):
        super().__init__("\n".join(faults), hint=hint)
        self.faults = faults


class Interrupted(BaseException):
    """A signal ended the work; exit code 128 + the signal's number, as a shell reports it.

    Like KeyboardInterrupt it is not an Exception. A signal handler raises it at any line, also
    inside a `try` whose `except Exception` is there for a bad row, a bad file or a library's error.
    Caught there, a preempted job would fail for good instead of being requeued.
    """

    def __init__(self, signal_name: str, signal_number: int):
        super().__init__(f"stopped by {signal_name}")
        self.signal_name = signal_name
        self.exit_code = 128 + signal_number


class ArgumentParser(argparse.ArgumentParser):
    """Whose errors are told as all others, and not by a usage of several lines."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", hint=f"{self.prog} --help")


def tell(text: str) -> None:
    """Say something to the person who watches, on stderr: a warning, a note, what is being done.

    stdout is for a command's answer, and only the command line (cli/) prints there.
    """
    print(text, file=sys.stderr, flush=True)


def report(error: BaseException, stream: TextIO | None = None) -> int:
    """Print `error` for a person and return the exit code. A bug of ours is raised again.

    stream: where to print; stderr unless given.
    """
    stream = stream or sys.stderr
    if isinstance(error, KeyboardInterrupt):
        print("error: interrupted", file=stream)
        return 130
    if isinstance(error, Interrupted):
        print(f"error: {error}", file=stream)
        return error.exit_code
    if isinstance(error, OSError):
        error = _from_os_error(error)
    if not isinstance(error, PostTrainingError):
        raise error
    faults = error.faults if isinstance(error, ConfigError) else [str(error).split("\nhint: ")[0]]
    for fault in faults:
        print(f"error: {fault}", file=stream)
    if error.hint:
        print(f"hint: {error.hint}", file=stream)
    return error.exit_code


def _from_os_error(error: OSError) -> PostTrainingError:
    hint = None
    if error.errno == errno.ENOSPC:
        hint = "free some space there or choose another folder; nothing half-written was kept"
    if error.errno == errno.EROFS:
        hint = (
            "in an image only what is mounted can be written: the working folder, and what "
            "`post-training edf run --mount SRC:DST …` adds"
        )
    problem = (error.strerror or str(error)).lower()
    if error.errno == errno.ENOENT and error.filename is None and _is_working_folder_gone():
        problem = "the working folder was removed"
        hint = "`cd` to a folder that exists; `cd .` where it was made anew"
    return PostTrainingError(problem, where=error.filename and str(error.filename), hint=hint)


def _is_working_folder_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """`data.datasets[0].path` for ("data", "datasets", 0, "path")."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def shown(value: Any, *, limit: int | None = 60) -> str:
    """A value on one line, cut after `limit` characters: 'text', 5e-07, null, [1, 'a'], {lr: 1}."""
    text = _one_line(value)
    return text if limit is None or len(text) <= limit else f"{text[:limit]}..."


def first_line(error: BaseException) -> str:
    """What an error of a library's says, on one line; with its type where the text says little."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # The texts of the others alone say little: `integer modulo by zero`.
    is_plain = isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError)
    return line if is_plain or line == type(error).__name__ else f"{type(error).__name__}: {line}"


def length_in_common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_one_line(below)}' for key, below in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_one_line, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
