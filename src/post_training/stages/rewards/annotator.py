"""Rows to rows with rewards: every judge judges every branch."""

import math
from typing import Any, Protocol

from post_training.data.branches import BRANCHES, ID, conversations_of
from post_training.data.rewards import RewardFunction
from post_training.data.rows import BadRow, Conversation
from post_training.stages.annotation.annotator import Annotator, Row

# What a judge says of a branch: the reward, and whether it saw only the beginning.
Judgement = tuple[float, bool]


class Judge(Protocol):
    """name: of the reward. num_tokens: read so far."""

    name: str
    num_tokens: int

    def __call__(
        self, rows: list[Row], conversations: list[list[Conversation]]
    ) -> list[list[Judgement] | BadRow]:
        """For each row: of each of its branches, whose conversations are given; or why not."""


class FunctionJudge:
    num_tokens = 0

    def __init__(self, name: str, function: RewardFunction):
        self.name = name
        self._function = function

    def __call__(
        self, rows: list[Row], conversations: list[list[Conversation]]
    ) -> list[list[Judgement] | BadRow]:
        answers = [[each.messages[-1].content for each in own] for own in conversations]
        judged = self._function(answers, rows, lambda row: rows[row][ID])
        return [
            own if isinstance(own, BadRow) else [(reward, False) for reward in own]
            for own in judged
        ]


class RewardAnnotator(Annotator):
    def __init__(self, judges: list[Judge]):
        self._judges = judges

    def __call__(self, rows: list[Row]) -> list[Row | BadRow]:
        results: list[Row | BadRow] = []
        conversations: dict[int, list[Conversation]] = {}
        for index, row in enumerate(rows):
            try:
                self._check_names(row)
                conversations[index] = conversations_of(row)
                results.append(row)
            except BadRow as bad:
                results.append(bad)
        for judge in self._judges:
            good = [index for index in conversations if not isinstance(results[index], BadRow)]
            before = judge.num_tokens
            judged = judge([rows[index] for index in good], [conversations[i] for i in good])
            self.num_tokens += judge.num_tokens - before
            for index, found in zip(good, judged, strict=True):
                results[index] = _with_reward(results[index], judge.name, found)
        return results

    def _check_names(self, row: Row) -> None:
        for index, branch in enumerate(row[BRANCHES]):
            for judge in self._judges:
                if judge.name in (branch.get("rewards") or {}):
                    key = f"{BRANCHES}[{index}].rewards"
                    raise BadRow("columns", f"{key}: there is a reward {judge.name!r} already")


def _with_reward(row: Any, name: str, found: list[Judgement] | BadRow) -> Row | BadRow:
    if isinstance(found, BadRow):
        return BadRow(found.reason, f"reward {name}: {found.problem}")
    branches = []
    for index, (branch, (reward, is_truncated)) in enumerate(
        zip(row[BRANCHES], found, strict=True)
    ):
        if not math.isfinite(reward):
            problem = f"reward {name}: {BRANCHES}[{index}]: must be finite (got {reward})"
            return BadRow("failed", problem)
        branch = {**branch, "rewards": {**(branch.get("rewards") or {}), name: reward}}
        if is_truncated:
            marks = branch.get("reward_is_truncated") or {}
            branch["reward_is_truncated"] = {**marks, name: True}
        branches.append(branch)
    return {**row, BRANCHES: branches}
