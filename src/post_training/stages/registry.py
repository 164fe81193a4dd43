"""The stages by name. A stage's configuration is light; its `run` brings torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from post_training.core.errors import UsageError
from post_training.stages.config import StageConfig
from post_training.stages.context import Result, StageContext


@dataclass(frozen=True)
class Stage:
    """package: a folder of stages/ with config.py (`config_class`) and run.py (`run`). artifacts:
    the folders of artifacts that a run can leave, which pipelines refer to."""

    name: str
    package: str
    config_class: str
    summary: str
    artifacts: tuple[str, ...] = ("dataset",)

    def load_config_class(self) -> type[StageConfig]:
        module = import_module(f"post_training.stages.{self.package}.config")
        return getattr(module, self.config_class)

    def load_run(self) -> Callable[[StageConfig, StageContext], Result]:
        return import_module(f"post_training.stages.{self.package}.run").run


# What every training stage can leave.
TRAINED = ("model", "adapter")
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "init-model",
            "init_model",
            "InitModelConfig",
            "make a tiny model and a tokenizer",
            ("model",),
        ),
        Stage("mix", "mix", "MixConfig", "one dataset from several, in the shares asked for"),
        Stage("split", "split", "SplitConfig", "a dataset in two: training and evaluation"),
        Stage("prepare", "prepare", "PrepareConfig", "token ids, masks and packed rows"),
        Stage("tokenize", "tokenize", "TokenizeConfig", "documents with markers to .bin and .idx"),
        Stage(
            "convert-tokenizer",
            "convert_tokenizer",
            "ConvertTokenizerConfig",
            "a SentencePiece model into a Hugging Face tokenizer",
            ("tokenizer",),
        ),
        Stage("filter", "filter", "FilterConfig", "leave out branches that are too long"),
        Stage("generate", "generate", "GenerateConfig", "sample completions of each prompt"),
        Stage("logprobs", "logprobs", "LogprobsConfig", "a model's log-probabilities of answers"),
        Stage("rewards", "rewards", "RewardsConfig", "rewards of answers, by models and functions"),
        Stage("select", "select", "SelectConfig", "preference rows from rewarded branches"),
        Stage("sft", "sft", "SftConfig", "supervised fine-tuning on chat data", TRAINED),
        Stage(
            "reward-model",
            "reward_model",
            "RewardModelConfig",
            "a reward model from preference rows",
            ("model",),
        ),
        Stage("dpo", "dpo", "DpoConfig", "preference training: DPO, QRPO and others", TRAINED),
    )
}


def find_stage(name: str) -> Stage:
    if name not in STAGES:
        raise UsageError(f"no stage {name!r}", hint=f"there are: {', '.join(STAGES)}")
    return STAGES[name]
