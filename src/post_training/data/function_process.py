"""The process in which functions of the user's are called: whatever one does, it does there.

    FunctionFiles     Python files of the user's, whose functions register themselves by name
    FunctionProcess   in our process: starts the other, sends rows, gets what was made of them
    main              in the other: loads the files, calls the functions

A function may loop for ever, end the process, change its folder or leave a thread behind: the run
ends with one line that names the file, the function and the row, or isn't touched by it at all. A
function gets a copy of the row, and what it prints goes to stderr. A call that takes too long ends
the run and is no verdict on its row, or the rows of a dataset would depend on the machine's speed.

A file's content is part of the recipe, so it can't import files beside it. It is executed once, in
each such process.
"""

import gc
import io
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.process import dies_with
from post_training.data.rows import BadRow

if TYPE_CHECKING:  # pydantic takes longer to import than a small file of functions
    from post_training.data.config import FunctionLimits

Function = TypeVar("Function", bound=Callable[..., Any])

# Waiting is counted in steps, not read from a clock: a job that was suspended is not slow.
_STEP_S = 0.25
_ROWS_AT_ONCE = 32  # many enough that the process is not waited for at each
_REPLY_BYTES = 1 << 20
# What both processes see: calls that were begun so far, and which row is under way.
_CALLS, _ROW = range(2)
_NUMBERS_BYTES = 2 * 8


class WrongResult(Exception):
    """A function returned what it may not: a fault of its own, whatever the row."""


class FunctionFiles:
    """Functions of one kind (transforms, rewards), by name.

    what: the word for one; `@register_<what>` marks it. module: has this object as FILES, and
    `call(function, argument, started)`, by which a function is called. setting: the setting that
    names the files. key: of the setting that names a function.
    """

    def __init__(self, what: str, module: str, *, setting: str, key: str):
        self.what = what
        self.module = module
        self.setting = setting
        self.key = key
        self._registered: dict[str, Callable[..., Any]] = {}  # of the file that is executed

    def register(self, name: str) -> Callable[[Function], Function]:
        """Errors: UsageError where the name is left out, which would register nothing."""
        if not isinstance(name, str):
            problem = f"@register_{self.what} needs a name: @register_{self.what}('NAME')"
            raise UsageError(problem)

        def register(function: Function) -> Function:
            if name in self._registered:
                raise UsageError(f"{self.what} {name!r} is registered twice")
            self._registered[name] = function
            return function

        return register

    def load(self, paths: tuple[Path, ...]) -> dict[str, tuple[Path, Callable[..., Any]]]:
        """Execute the files; {name: (file, function)} of all of them.

        Errors: UsageError for a file that fails or registers nothing, and for a name used twice.
        """
        found: dict[str, tuple[Path, Callable[..., Any]]] = {}
        for path in paths:
            for name, function in self._functions_of(path).items():
                if name in found:
                    problem = f"{self.what} {name!r} is registered by {found[name][0]} too"
                    raise UsageError(problem, where=str(path))
                found[name] = path, function
        return found

    def _functions_of(self, path: Path) -> dict[str, Callable[..., Any]]:
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        self._registered.clear()
        try:
            code = path.read_bytes()
        except OSError as error:
            raise UsageError(f"can't be read: {error.strerror}".lower(), where=str(path)) from None
        try:
            # Not by import, which would leave a __pycache__ beside it and could take a stale one.
            exec(compile(code, path, "exec"), module.__dict__)
        except UsageError as error:
            raise UsageError(error.problem, where=str(path)) from None
        except BaseException as error:  # sys.exit(0) too: its file is no program.
            problem = f"can't be loaded: {type(error).__name__}: {error}"
            line = _line(path, error)
            where = f"{path}:{line}" if line else str(path)
            raise UsageError(" ".join(problem.split()), where=where) from error
        if not self._registered:
            register = f"register_{self.what}"
            hint = f"from {self.module} import {register}, and @{register}('NAME') above a function"
            raise UsageError(f"registers no {self.what}", where=str(path), hint=hint)
        return dict(self._registered)


def fault_of(path: Path, error: BaseException) -> str:
    """`file.py:LINE: KeyError: 'answer'`, on one line: of what a function of the file raised."""
    line = _line(path, error)
    place = f"{path.name}:{line}" if line else path.name
    return " ".join(f"{place}: {type(error).__name__}: {error}".split())


def _line(path: Path, error: BaseException) -> int | None:
    """The last line of the file that the error passed through."""
    line = None
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


class FunctionProcess:
    """The process of some files, as ours sees it. functions: {name: file}. has_ended: it was
    killed, and is of no more use."""

    def __init__(self, files: FunctionFiles, paths: tuple[Path, ...], limits: "FunctionLimits"):
        """Errors: UsageError for a file that fails, or registers nothing."""
        self._what, self._limits, self.has_ended = files.what, limits, False
        memory = os.memfd_create("calls")
        os.truncate(memory, _NUMBERS_BYTES)
        self._numbers = _shared_numbers(memory)
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        code = f"from {__name__} import main; main()"
        words = [str(number) for number in (theirs.fileno(), memory, os.getpid())]
        self._process = subprocess.Popen(
            # -P: no file of the working folder is a module.
            [sys.executable, "-P", "-c", code, *words],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is for data
            pass_fds=(theirs.fileno(), memory),
            start_new_session=True,  # so that what a function starts can be ended with it
        )
        theirs.close()
        os.close(memory)
        where = ", ".join(map(str, paths))
        start = (sys.path, files.module, [str(path) for path in paths], limits.model_dump())
        try:
            self._connection.send(start)
            succeeded, found = self._receive("can't be loaded: it", lambda row: where)
        except BaseException:
            self.end()
            raise
        if not succeeded:
            self.end()
            problem, where, hint = found
            raise UsageError(problem, where=where, hint=hint)
        self.functions: dict[str, Path] = {name: Path(path) for name, path in found.items()}

    def call(
        self, name: str, arguments: Sequence[Any], where: Callable[[int], str]
    ) -> Iterator[Any]:
        """What the function makes of each argument, or the BadRow that it made of it.

        where: the row of an argument, for messages.
        Errors: PostTrainingError that names the row, where the function returns what it may not,
        takes too long, or ends its process.
        """
        what = f"{self._what} {name!r} of {self.functions[name].name}"
        for start in range(0, len(arguments), _ROWS_AT_ONCE):
            rows = arguments[start : start + _ROWS_AT_ONCE]
            try:
                outcomes = self._outcomes(name, rows, what, lambda row, s=start: where(s + row))
            except BaseException:
                self.end()  # Its answer to these rows must not be taken for that to later ones.
                raise
            yield from outcomes

    def _outcomes(
        self, name: str, rows: Sequence[Any], what: str, where: Callable[[int], str]
    ) -> list[Any]:
        outcomes: list[Any] = []
        self._numbers[_ROW] = 0
        # Where the process is gone already, there is no answer either: _receive then says why.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((name, rows))
        while len(outcomes) < len(rows):
            for data in self._receive(what, where):
                outcome = pickle.loads(data)
                if isinstance(outcome, _Fault):
                    problem = f"{what} {outcome.problem}"
                    raise PostTrainingError(problem, where=where(len(outcomes)))
                outcomes.append(outcome)
        return outcomes

    def _receive(self, what: str, where: Callable[[int], str]) -> Any:
        """The next message. Errors: PostTrainingError where none comes."""
        waited, calls = 0.0, self._numbers[_CALLS]
        while not self._connection.poll(_STEP_S):
            if self._process.poll() is not None and not self._connection.poll():
                break  # Something that it started holds the connection.
            if self._numbers[_CALLS] != calls:
                waited, calls = 0.0, self._numbers[_CALLS]
            waited += _STEP_S
            if waited >= self._limits.timeout_s:
                raise PostTrainingError(
                    f"{what} did not end within {self._limits.timeout_s:g} s",
                    where=where(self._numbers[_ROW]),
                    hint="if it needs longer, set data.function_limits.timeout_s",
                )
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            problem = f"{what} {self._ending()}"
            raise PostTrainingError(problem, where=where(self._numbers[_ROW])) from None

    def _ending(self) -> str:
        try:
            code = self._process.wait(_STEP_S)
        except subprocess.TimeoutExpired:
            return "closed the connection to its process"
        if code >= 0:
            return f"ended its process with exit code {code}, and must return or raise an error"
        memory = ": most often the machine ran out of memory" if code == -signal.SIGKILL else ""
        return f"ended its process by {signal.Signals(-code).name}{memory}"

    def end(self) -> None:
        """Kill it, and what it started."""
        if self.has_ended:  # Another process may have its id by now.
            return
        self.has_ended = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()


@dataclass(frozen=True)
class _Fault:
    """A fault of the function itself, whatever the row was: it ends the run."""

    problem: str


def main() -> None:
    """What the process of the functions runs. Its arguments: the descriptors of the connection and
    of the shared numbers, and our process id."""
    channel, memory, parent = map(int, sys.argv[1:])
    dies_with(parent)()
    os.environ.pop("PYTHONSAFEPATH", None)  # Ours, and not for programs that a function starts.
    # Ctrl-C and a launcher's signals go to all processes of a run: our parent ends us. Not SIG_IGN,
    # which a program that a function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    for descriptor in (channel, memory):
        os.set_inheritable(descriptor, False)
    numbers, connection = _shared_numbers(memory), Connection(channel)
    sys.path[:], module, paths, limits = connection.recv()
    output = _LimitedOutput(", ".join(paths), limits["max_printed_bytes"])
    sys.stdout = sys.stderr = io.TextIOWrapper(
        output, "utf-8", "backslashreplace", write_through=True
    )
    kind = import_module(module)
    try:
        found = kind.FILES.load(tuple(map(Path, paths)))
    except UsageError as error:
        connection.send((False, (error.problem, error.where, error.hint)))
        os._exit(2)
    connection.send((True, {name: str(path) for name, (path, _) in found.items()}))
    gc.freeze()

    def started() -> None:
        numbers[_CALLS] += 1

    while True:
        try:
            name, rows = connection.recv()
        except EOFError:
            os._exit(0)  # Threads that a function left behind must not keep us.
        replies: list[bytes] = []
        for index, row in enumerate(rows):
            numbers[_ROW] = index
            outcome = _outcome(kind.call, *found[name], row, started)
            replies.append(_reply(outcome, limits["max_result_bytes"]))
            if sum(map(len, replies)) > _REPLY_BYTES:
                connection.send(replies)
                replies = []
        connection.send(replies)


def _outcome(
    call: Callable[..., Any],
    path: Path,
    function: Callable[..., Any],
    row: Any,
    started: Callable[[], None],
) -> Any:
    try:
        return call(function, row, started)
    except WrongResult as error:
        return _Fault(str(error))
    except Exception as error:
        return BadRow("failed", fault_of(path, error))
    except BaseException as error:
        return _Fault(f"must return or raise an Exception (raised {fault_of(path, error)})")


def _reply(outcome: Any, max_bytes: int) -> bytes:
    try:
        data = pickle.dumps(outcome)
    except Exception as error:
        return pickle.dumps(_Fault(f"returned something that is not data: {error}"))
    if len(data) > max_bytes:
        limit = f"the limit is {max_bytes:,}: data.function_limits.max_result_bytes"
        return pickle.dumps(_Fault(f"returned {len(data):,} bytes ({limit})"))
    return data


def _shared_numbers(memory: int) -> memoryview:
    return memoryview(mmap.mmap(memory, _NUMBERS_BYTES)).cast("q")


class _LimitedOutput(io.RawIOBase):
    """stderr, for so many bytes; that more was printed is said once."""

    def __init__(self, name: str, limit: int):
        self._name, self._left = name, limit

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any) -> int:
        if self._left > 0:
            os.write(2, bytes(data)[: self._left])
            self._left -= len(data)
            if self._left <= 0:
                note = f"\nwarning: {self._name}: prints more than "
                os.write(2, f"{note}data.function_limits.max_printed_bytes: left out\n".encode())
        return len(data)
