"""Add rewards to branches: RUN/dataset/rows.jsonl.

branch:  rewards               {name: number}; those that it has already stay
         reward_is_truncated   {name: true} where a model saw only the beginning

The record has their means: NAME over the sampled branches, NAME/offline over those of the data.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any, Protocol

from post_training.annotate.annotate import ROWS, annotate
from post_training.annotate.config import RewardConfig, RewardsConfig
from post_training.annotate.work import Annotator, Row
from post_training.data.branches import BRANCHES, ID, conversations_of
from post_training.data.chat.layout import TextEncoder
from post_training.data.rewards import RewardFunction, find_reward
from post_training.data.rows import BadRow, Conversation
from post_training.data.user_functions import end_functions
from post_training.models.attention import check_positions, most_positions
from post_training.models.device import move_to_device
from post_training.models.load import check_vocabulary, load_reward_model, load_tokenizer
from post_training.models.score import RewardScorer
from post_training.stages.context import Result, StageContext


def run(config: RewardsConfig, context: StageContext) -> Result:
    for reward in config.rewards:
        if reward.function is not None:
            # Refused now, and not in every worker.
            find_reward(reward.function, config.functions, config.data.function_limits)

    def make_annotator() -> RewardAnnotator:
        return RewardAnnotator([_load_judge(reward, config, context) for reward in config.rewards])

    try:
        result = annotate(config, context, make_annotator)
    finally:
        end_functions()
    if config.is_worker or not context.ranks.is_writer:
        return result
    means = _means(context.run_dir / "dataset" / ROWS, [reward.name for reward in config.rewards])
    context.log(", ".join(f"{name}: {mean:.4g}" for name, mean in means.items()))
    return replace(result, metrics={**result.metrics, **means})


def _means(rows: Path, names: Sequence[str]) -> dict[str, float]:
    """The mean of each reward over the branches in a file of rows; see the module."""
    found: dict[str, list[float]] = {}
    with open(rows, "rb") as file:
        for line in file:
            for branch in json.loads(line)[BRANCHES]:
                kind = "" if branch.get("is_reference_completion") else "/offline"
                for name in names:
                    found.setdefault(f"{name}{kind}", []).append(branch["rewards"][name])
    return {name: fsum(values) / len(values) for name, values in sorted(found.items())}


# What a judge says of a branch: the reward, and whether it saw only the beginning.
Judgement = tuple[float, bool]


class Judge(Protocol):
    """What gives rewards: a function, or a model. name: of the reward. num_tokens: read so far."""

    name: str
    num_tokens: int

    def __call__(
        self, rows: list[Row], conversations: list[list[Conversation]]
    ) -> list[list[Judgement] | BadRow]:
        """For each row: of each of its branches, whose conversations are given; or why not."""


class RewardAnnotator(Annotator):
    """Every judge judges every branch."""

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
                results[index] = _add_reward(results[index], judge.name, found)
        return results

    def _check_names(self, row: Row) -> None:
        for index, branch in enumerate(row[BRANCHES]):
            for judge in self._judges:
                if judge.name in (branch.get("rewards") or {}):
                    key = f"{BRANCHES}[{index}].rewards"
                    raise BadRow("columns", f"{key}: there is a reward {judge.name!r} already")


def _add_reward(row: Any, name: str, found: list[Judgement] | BadRow) -> Row | BadRow:
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


class ModelJudge:
    """A reward model. max_length: of a conversation, in tokens. marks: a longer one is cut and
    marked, not refused."""

    def __init__(
        self,
        name: str,
        encoder: TextEncoder,
        scorer: RewardScorer,
        max_length: int | None,
        *,
        marks: bool,
    ):
        self.name = name
        self.num_tokens = 0
        self._encoder = encoder
        self._scorer = scorer
        self._max_length = max_length
        self._marks = marks

    def __call__(
        self, rows: list[Row], conversations: list[list[Conversation]]
    ) -> list[list[Judgement] | BadRow]:
        read: list[list[tuple[list[int], bool]] | BadRow] = []
        for own in conversations:
            try:
                read.append([self._read(conversation) for conversation in own])
            except BadRow as bad:
                read.append(bad)
        groups = [[ids for ids, _ in own] for own in read if not isinstance(own, BadRow) and own]
        rewards = iter(self._scorer.score(groups))
        judged: list[list[Judgement] | BadRow] = []
        for own in read:
            if isinstance(own, BadRow) or not own:
                judged.append(own if isinstance(own, BadRow) else [])
                continue
            marks = [is_cut for _, is_cut in own]
            judged.append(list(zip(next(rewards), marks, strict=True)))
        return judged

    def _read(self, conversation: Conversation) -> tuple[list[int], bool]:
        """(ids, whether they are only the beginning). Errors: BadRow."""
        ids = self._encoder.encode(conversation)
        limit = self._max_length
        is_cut = limit is not None and len(ids) > limit
        if is_cut and not self._marks:
            problem = f"a conversation of {len(ids)} tokens (the limit is {limit})"
            raise BadRow("failed", problem)
        ids = ids[:limit] if is_cut else ids
        self.num_tokens += len(ids)
        return ids, is_cut


def _load_judge(reward: RewardConfig, config: RewardsConfig, context: StageContext) -> Judge:
    if reward.function is not None:
        limits = config.data.function_limits
        function = find_reward(reward.function, config.functions, limits)
        return FunctionJudge(reward.name, function)
    return _load_model_judge(reward, config, context.ranks.local_rank)


def _load_model_judge(reward: RewardConfig, config: RewardsConfig, local_rank: int) -> ModelJudge:
    """Errors: PostTrainingError for what is no reward model, or a template that doesn't fit."""
    assert reward.model is not None
    path = reward.model.path
    tokenizer = load_tokenizer(path)
    encoder = TextEncoder(tokenizer, reward.chat_template)
    model = load_reward_model(
        path,
        dtype=reward.model.dtype,
        attn_implementation=reward.model.attn_implementation,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    check_vocabulary(model, tokenizer)
    scorer = RewardScorer(
        move_to_device(model, local_rank),
        max_batch_tokens=config.max_batch_tokens,
        prompts_per_batch=config.prompts_per_batch,
    )
    if reward.max_seq_length is not None:
        where = f"rewards: {reward.name}: max_seq_length"
        check_positions(model.config, reward.max_seq_length, where=where)
    max_length = reward.max_seq_length or most_positions(model.config)
    return ModelJudge(reward.name, encoder, scorer, max_length, marks=reward.overlong == "mark")
