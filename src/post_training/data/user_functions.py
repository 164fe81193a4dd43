"""Functions from files of the user's, by name, and the processes in which they are called.

find_function   a function that is called with many arguments at once (function_process.py)
end_functions   their processes, once a part of the work needs them no more
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.core.errors import UsageError
from post_training.data.function_process import FunctionFiles, FunctionProcess

if TYPE_CHECKING:  # pydantic takes longer to import than a small file of functions
    from post_training.data.config import FunctionLimits

# (arguments, the row of an argument) -> what the function makes of each: FunctionProcess.call.
UserFunction = Callable[[Sequence[Any], Callable[[int], str]], Iterator[Any]]


def find_function(
    files: FunctionFiles,
    name: str,
    paths: Sequence[Path],
    limits: "FunctionLimits",
    built_in: Sequence[str] = (),
) -> UserFunction:
    """The function registered as `name` in one of the files. built_in: names known without files,
    for the error.

    Errors: UsageError when there is none; or a file fails or registers nothing, or two have it.
    """
    found = registered_names(files, paths, limits)
    if name not in found:
        from post_training.config.faults import nearest

        known = f"known: {', '.join(found)}" if found else f"{files.setting} names no file"
        if built_in:
            known = f"{known}; built in: {', '.join(built_in)}"
        near = nearest(name, [*found, *built_in])
        problem = f"{files.key}: unknown name {name!r}{near}; {known}"
        raise UsageError(problem)

    def call(arguments: Sequence[Any], where: Callable[[int], str]) -> Iterator[Any]:
        # Looked for anew: the process may have ended since.
        yield from _process_of(files, paths, limits).call(name, arguments, where)

    return call


def registered_names(
    files: FunctionFiles, paths: Sequence[Path], limits: "FunctionLimits"
) -> list[str]:
    """Of the functions in the files. Errors: UsageError where a file fails or registers nothing."""
    return list(_process_of(files, paths, limits).functions) if paths else []


@atexit.register
def end_functions() -> None:
    """Those of this process; where they are needed again, another is started."""
    for key, process in list(_RUNNING.items()):
        if key[0] == os.getpid():
            del _RUNNING[key]
            process.end()


def _process_of(
    files: FunctionFiles, paths: Sequence[Path], limits: "FunctionLimits"
) -> FunctionProcess:
    """The one of this process that has these files, started where it isn't running yet."""
    key = (os.getpid(), files.what, tuple(paths), limits)
    process = _RUNNING.get(key)
    if process is None or process.has_ended:
        process = _RUNNING[key] = FunctionProcess(files, tuple(paths), limits)
    return process


_RUNNING: dict[tuple, FunctionProcess] = {}
