"""Functions of the user's that say how good an answer is.

    # final_number.py, named in `functions`; `{name: right, function: final_number}` in `rewards`
    from post_training.data.rewards import register_reward

    @register_reward("final_number")
    def final_number(answer, row):
        return float(row["original_metadata"]["answer"].endswith(answer))

A function gets the text of the branch's last message and the whole row (data/branches.py), and
returns a number. What it raises is the row's fault, told with the line of the file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from post_training.config.faults import nearest
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.formats.values import is_number
from post_training.data.function_files import FunctionFiles, fault_of
from post_training.data.rows import BadRow

RewardFunction = Callable[[str, dict[str, Any]], float]

_FILES = FunctionFiles("reward")
register_reward = _FILES.register


def find_reward(name: str, paths: Sequence[Path]) -> RewardFunction:
    """The function registered as `name` in one of the files; it raises BadRow for what the user's
    raises, and PostTrainingError when that returns no finite number.

    Errors: UsageError when there is none, or a file can't be loaded.
    """
    found = _FILES.load(tuple(paths))
    if name not in found:
        known = f"known: {', '.join(found)}" if found else "functions names no file"
        raise UsageError(f"function: unknown name {name!r}{nearest(name, list(found))}; {known}")
    path, function = found[name]

    def reward(answer: str, row: dict[str, Any]) -> float:
        try:
            value = function(answer, row)
        except Exception as error:
            raise BadRow("failed", fault_of(path, error)) from error
        value = float(value) if isinstance(value, bool) else value
        if not is_number(value):
            raise PostTrainingError(
                f"reward {name!r} must return a finite number (got {value!r})", where=str(path)
            )
        return float(value)

    return reward
