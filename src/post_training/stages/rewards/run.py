"""Add rewards to branches: RUN/dataset/rows.jsonl.

branch:  rewards               {name: number}; those that it has already stay
         reward_is_truncated   {name: true} where a model saw only the beginning
"""

from post_training.data.rewards import find_reward
from post_training.models.quiet import quiet_libraries
from post_training.stages.annotation.annotate import annotate
from post_training.stages.context import Result, StageContext
from post_training.stages.rewards.annotator import FunctionJudge, Judge, RewardAnnotator
from post_training.stages.rewards.config import RewardConfig, RewardsConfig

VERSION = 1


def run(config: RewardsConfig, context: StageContext) -> Result:
    quiet_libraries(context.run_dir / "cache")
    for reward in config.rewards:
        if reward.function is not None:
            find_reward(reward.function, config.functions)  # refused now, not in every worker

    def make_annotator() -> RewardAnnotator:
        return RewardAnnotator([_judge(reward, config, context) for reward in config.rewards])

    return annotate(config, context, make_annotator, version=VERSION)


def _judge(reward: RewardConfig, config: RewardsConfig, context: StageContext) -> Judge:
    if reward.function is not None:
        return FunctionJudge(reward.name, find_reward(reward.function, config.functions))
    from post_training.stages.rewards.model_judge import load_judge

    return load_judge(reward, config, context.ranks.local_rank)
