"""Functions of the user's that each row of a dataset goes through before it is parsed.

    # filters.py, named in data.transforms; `transform: short` in the dataset's settings
    from post_training.data.transforms import register_transform

    @register_transform("short")
    def short(row):
        return row if len(row["answer"]) < 500 else None

A function gets the row's JSON object and returns one, a list of them, or None: leave it out. The
file's content is part of the recipe, so it can't import files beside it. It is executed anew in
every process in which its functions are called; ours are not among them (function_process.py).

Those of public datasets are built in (public/kinds.py), and called in our own process. A name that
a file of the user's registers is the user's.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.data.function_process import FunctionFiles, WrongResult
from post_training.data.public.kinds import BUILT_IN_TRANSFORMS
from post_training.data.rows import BadRow
from post_training.data.user_functions import find_function, registered_names

if TYPE_CHECKING:
    from post_training.data.config import FunctionLimits

Object = dict[str, Any]
Function = Callable[[Object], Object | list[Object] | None]
# (rows, the place of a row) -> what each becomes, or the error that the function raised.
Transform = Callable[[Sequence[Object], Callable[[int], str]], Iterator[list[Object] | BadRow]]

FILES = FunctionFiles("transform", __name__, setting="data.transforms", key="transform")
register_transform = FILES.register


def call(function: Function, row: Object, started: Callable[[], None]) -> list[Object]:
    """Call a transform, in the process of its file. started: to be called before each call."""
    started()
    result = function(row)
    if result is None:
        return []
    results = result if isinstance(result, list) else [result]
    for item in results:
        if not isinstance(item, dict):
            kind = type(item).__name__
            raise WrongResult(f"must return a dict, a list of dicts or None (got {kind})")
    return results


def find_transform(name: str, paths: Sequence[Path], limits: "FunctionLimits") -> Transform:
    """The function registered as `name` in one of the files, else the built-in one.

    Errors: UsageError as of find_function; of a call, PostTrainingError where the function returns
    no row, or doesn't return.
    """
    if name in BUILT_IN_TRANSFORMS and name not in registered_names(FILES, paths, limits):
        return partial(_call_built_in, name)
    function = find_function(FILES, name, paths, limits, tuple(BUILT_IN_TRANSFORMS))

    def transform(
        rows: Sequence[Object], where: Callable[[int], str]
    ) -> Iterator[list[Object] | BadRow]:
        for result in function(rows, where):
            yield _named(name, result) if isinstance(result, BadRow) else result

    return transform


def _call_built_in(
    name: str, rows: Sequence[Object], _: Callable[[int], str]
) -> Iterator[list[Object] | BadRow]:
    for row in rows:
        try:
            yield BUILT_IN_TRANSFORMS[name](row)
        except BadRow as bad:
            yield _named(name, bad)


def _named(name: str, bad: BadRow) -> BadRow:
    return BadRow("transform", f"transform {name}: {bad.problem}", bad.hint)
