"""Functions of the user's that each row of a dataset goes through before it is parsed.

    # filters.py, named in data.transforms; `transform: short` in the dataset's settings
    from post_training.data.transforms import register_transform

    @register_transform("short")
    def short(row):
        return row if len(row["answer"]) < 500 else None

A function gets the row's JSON object and returns one, a list of them, or None: leave it out. The
file's content is part of the recipe, so it can't import files beside it. It is executed anew in
every process that asks for one of its functions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from post_training.config.faults import nearest
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.function_files import FunctionFiles, fault_of
from post_training.data.rows import BadRow

Object = dict[str, Any]
Function = Callable[[Object], Object | list[Object] | None]

_FILES = FunctionFiles("transform")
register_transform = _FILES.register


class Transform:
    """One of the functions, with its faults told apart from the row's."""

    def __init__(self, name: str, path: Path, function: Function):
        self.name = name
        self.path = path
        self._function = function

    def __call__(self, value: Object) -> list[Object]:
        """Errors: BadRow when the function raises; PostTrainingError when it returns no row."""
        try:
            result = self._function(value)
        except Exception as error:
            raise BadRow(
                "transform", f"transform {self.name}: {fault_of(self.path, error)}"
            ) from error
        if result is None:
            return []
        results = result if isinstance(result, list) else [result]
        for item in results:
            if not isinstance(item, dict):
                raise PostTrainingError(
                    f"transform {self.name!r} must return a dict, a list of dicts or None "
                    f"(got {type(item).__name__})",
                    where=str(self.path),
                )
        return results


def find_transform(name: str, paths: Sequence[Path]) -> Transform:
    """The function registered as `name` in one of the files.

    Errors: UsageError when there is none; as of `load_transforms`.
    """
    transforms = load_transforms(tuple(paths))
    if name not in transforms:
        known = f"known: {', '.join(transforms)}" if transforms else "data.transforms names no file"
        raise UsageError(
            f"transform: unknown name {name!r}{nearest(name, list(transforms))}; {known}"
        )
    return transforms[name]


def load_transforms(paths: tuple[Path, ...]) -> dict[str, Transform]:
    """Execute the files; every function that they register, by name. Once in a process.

    Errors: UsageError for a file that fails or registers nothing, and for a name used twice.
    """
    return {
        name: Transform(name, path, function)
        for name, (path, function) in _FILES.load(paths).items()
    }
