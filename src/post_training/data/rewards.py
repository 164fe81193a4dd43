"""Functions of the user's that say how good an answer is.

    # final_number.py, named in `functions`; `{name: right, function: final_number}` in `rewards`
    from post_training.data.rewards import register_reward

    @register_reward("final_number")
    def final_number(answer, row):
        return float(row["original_metadata"]["answer"].endswith(answer))

A function gets the text of the branch's last message and the whole row (data/branches.py), a copy
for each call, and returns a number. What it raises is the row's fault, told with the line of the
file. It is called in a process of its own (function_process.py).
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.core.errors import UsageError
from post_training.data.formats.values import is_number
from post_training.data.function_files import FunctionFiles, WrongResult
from post_training.data.rows import BadRow

if TYPE_CHECKING:
    from post_training.data.config import FunctionLimits

Row = dict[str, Any]

FILES = FunctionFiles("reward", __name__)
register_reward = FILES.register


def call(
    function: Callable[[str, Row], Any],
    argument: tuple[list[str], bytes],
    started: Callable[[], None],
) -> list[float]:
    """As it is called in its process. argument: the answers to a row, and the row, pickled."""
    answers, row = argument
    rewards = []
    for answer in answers:
        started()
        value = function(answer, pickle.loads(row))
        value = float(value) if isinstance(value, bool) else value
        if not is_number(value):
            raise WrongResult(f"must return a finite number (got {value!r:.60})")
        rewards.append(float(value))
    return rewards


class RewardFunction:
    """One of the functions of the files."""

    def __init__(self, name: str, paths: Sequence[Path], limits: "FunctionLimits"):
        self.name = name
        self._paths = paths
        self._limits = limits

    def __call__(
        self, answers: Sequence[list[str]], rows: Sequence[Row], where: Callable[[int], str]
    ) -> Iterator[list[float] | BadRow]:
        """The rewards of each row's answers, or the error that the function raised.

        where: a row's name. Errors: PostTrainingError where it returns no finite number, or
        doesn't return.
        """
        from post_training.data.function_process import functions_of

        functions = functions_of(FILES, self._paths, self._limits)
        arguments = [(own, pickle.dumps(row)) for own, row in zip(answers, rows, strict=True)]
        yield from functions.call(self.name, arguments, where)


def find_reward(name: str, paths: Sequence[Path], limits: "FunctionLimits") -> RewardFunction:
    """The function registered as `name` in one of the files.

    Errors: UsageError when there is none, or a file can't be loaded.
    """
    from post_training.config.faults import nearest
    from post_training.data.function_process import functions_of

    found = functions_of(FILES, paths, limits).functions if paths else {}
    if name not in found:
        known = f"known: {', '.join(found)}" if found else "functions names no file"
        raise UsageError(f"function: unknown name {name!r}{nearest(name, list(found))}; {known}")
    return RewardFunction(name, paths, limits)
