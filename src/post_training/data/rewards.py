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

from post_training.data.formats.values import is_number
from post_training.data.function_process import FunctionFiles, WrongResult
from post_training.data.rows import BadRow
from post_training.data.user_functions import find_function

if TYPE_CHECKING:
    from post_training.data.config import FunctionLimits

Row = dict[str, Any]
# (the answers to each row, the rows, the name of a row) -> the rewards of its answers, or the error
# that the function raised.
RewardFunction = Callable[
    [Sequence[list[str]], Sequence[Row], Callable[[int], str]], Iterator[list[float] | BadRow]
]

FILES = FunctionFiles("reward", __name__, setting="functions", key="function")
register_reward = FILES.register


def call(
    function: Callable[[str, Row], Any],
    argument: tuple[list[str], bytes],
    started: Callable[[], None],
) -> list[float]:
    """Call a reward, in the process of its file.

    argument: the answers to a row, and the row, pickled. started: to be called before each call.
    """
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


def find_reward(name: str, paths: Sequence[Path], limits: "FunctionLimits") -> RewardFunction:
    """The function registered as `name` in one of the files.

    Errors: UsageError as of find_function; of a call, PostTrainingError where the function returns
    no finite number, or doesn't return.
    """
    function = find_function(FILES, name, paths, limits)

    def reward(
        answers: Sequence[list[str]], rows: Sequence[Row], where: Callable[[int], str]
    ) -> Iterator[list[float] | BadRow]:
        arguments = [(own, pickle.dumps(row)) for own, row in zip(answers, rows, strict=True)]
        yield from function(arguments, where)

    return reward
