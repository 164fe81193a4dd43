"""Add rewards to branches: RUN/dataset/rows.jsonl.

branch:  rewards               {name: number}; those that it has already stay
         reward_is_truncated   {name: true} where a model saw only the beginning

The record has their means: NAME over the sampled branches, NAME/offline over those of the data.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path

from post_training.data.branches import BRANCHES
from post_training.data.rewards import find_reward
from post_training.data.user_functions import end_functions
from post_training.models.quiet import quiet_libraries
from post_training.stages.annotation.annotate import annotate
from post_training.stages.annotation.merge import ROWS
from post_training.stages.context import Result, StageContext
from post_training.stages.rewards.annotator import FunctionJudge, Judge, RewardAnnotator
from post_training.stages.rewards.config import RewardConfig, RewardsConfig


def run(config: RewardsConfig, context: StageContext) -> Result:
    quiet_libraries(context.run_dir / "cache")
    for reward in config.rewards:
        if reward.function is not None:
            find_reward(
                reward.function, config.functions, config.data.function_limits
            )  # refused now, not in every worker

    def make_annotator() -> RewardAnnotator:
        return RewardAnnotator([_judge(reward, config, context) for reward in config.rewards])

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
    found: dict[str, list[float]] = {}
    with open(rows, "rb") as file:
        for line in file:
            for branch in json.loads(line)[BRANCHES]:
                kind = "" if branch.get("is_reference_completion") else "/offline"
                for name in names:
                    found.setdefault(f"{name}{kind}", []).append(branch["rewards"][name])
    return {name: fsum(values) / len(values) for name, values in sorted(found.items())}


def _judge(reward: RewardConfig, config: RewardsConfig, context: StageContext) -> Judge:
    if reward.function is not None:
        limits = config.data.function_limits
        function = find_reward(reward.function, config.functions, limits)
        return FunctionJudge(reward.name, function)
    from post_training.stages.rewards.model_judge import load_judge

    return load_judge(reward, config, context.ranks.local_rank)
