"""Python files of the user's whose functions register themselves, by name.

The file's content is part of the recipe, so it can't import files beside it. It is executed, once,
in each process that calls its functions, which does nothing else (function_process.py).
"""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from post_training.core.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


class WrongResult(Exception):
    """A function returned what it may not: a fault of its own, whatever the row."""


class FunctionFiles:
    """Functions of one kind. what: the word for them; `@register_<what>` marks one. module: has
    this as FILES, and `call(function, argument, started)`, by which one is called. setting: that
    names the files. key: of the setting that names a function."""

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
