"""The stages by name: the module that runs each, and the class of its configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from post_training.config.reference import (
    explain_lines,
    find_settings,
    list_lines,
    list_settings,
)
from post_training.core.errors import UsageError
from post_training.stages.config import StageConfig
from post_training.stages.context import Result, StageContext


@dataclass(frozen=True)
class Stage:
    """module: below post_training, as `train.sft`; it has `run`. config_class: in config.py beside
    the module. used_as: the setting of a next stage that takes what this one made, where that is
    known. artifacts: the folders of artifacts that a run can leave, which pipelines refer to;
    StageConfig.own_artifacts has them where they are settings.
    """

    name: str
    module: str
    config_class: str
    summary: str
    used_as: str | None
    artifacts: tuple[str, ...] = ("dataset",)

    def load_config_class(self) -> type[StageConfig]:
        """Light: it imports nothing of the training stack."""
        package, _, _ = self.module.rpartition(".")
        return getattr(import_module(f"post_training.{package}.config"), self.config_class)

    def load_run(self) -> Callable[[StageConfig, StageContext], Result]:
        """What does the stage. The training stack is imported here."""
        return import_module(f"post_training.{self.module}").run


# What every training stage can leave.
TRAINED = ("model", "adapter")
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "init-model",
            "stages.init_model",
            "InitModelConfig",
            "make a tiny model and a tokenizer",
            "sft, as model.path",
            ("model",),
        ),
        Stage(
            "mix",
            "stages.mix",
            "MixConfig",
            "one dataset from several, in the shares asked for",
            "sft, as data.datasets[0].path",
        ),
        Stage(
            "split",
            "stages.split",
            "SplitConfig",
            "a dataset in two: training and evaluation",
            "sft, as data.datasets[0].path and evaluation.datasets[0].path",
        ),
        Stage(
            "prepare",
            "stages.prepare",
            "PrepareConfig",
            "token ids, masks and packed rows",
            "sft or dpo, as data.prepared",
        ),
        Stage(
            "tokenize",
            "stages.tokenize",
            "TokenizeConfig",
            "documents with markers to .bin and .idx",
            "sft, as data.indexed",
        ),
        Stage(
            "convert-tokenizer",
            "stages.convert_tokenizer",
            "ConvertTokenizerConfig",
            "a SentencePiece model into a Hugging Face tokenizer",
            "prepare or tokenize, as tokenizer",
            ("tokenizer",),
        ),
        Stage(
            "convert",
            "stages.weights.convert",
            "ConvertConfig",
            "a checkpoint of Megatron or GPT-NeoX into a model, or back to Megatron",
            "sft or generate, as model.path",
            ("model", "checkpoint"),
        ),
        Stage(
            "merge",
            "stages.weights.merge",
            "MergeConfig",
            "several models made into one",
            "sft or generate, as model.path",
            ("model",),
        ),
        Stage(
            "filter",
            "annotate.filter",
            "FilterConfig",
            "leave out branches that are too long",
            "generate or rewards, as data.datasets[0].path",
        ),
        Stage(
            "generate",
            "annotate.generate",
            "GenerateConfig",
            "sample completions of each prompt",
            "rewards, as data.datasets[0].path",
        ),
        Stage(
            "logprobs",
            "annotate.logprobs",
            "LogprobsConfig",
            "a model's log-probabilities of answers",
            "rewards or dpo, as data.datasets[0].path",
        ),
        Stage(
            "rewards",
            "annotate.rewards",
            "RewardsConfig",
            "rewards of answers, by models and functions",
            "select, as data.datasets[0].path",
        ),
        Stage(
            "select",
            "annotate.select",
            "SelectConfig",
            "preference rows from rewarded branches",
            "dpo, as data.datasets[0].path",
        ),
        Stage(
            "sft",
            "train.sft",
            "SftConfig",
            "supervised fine-tuning on chat data",
            "generate or dpo, as model.path",
            TRAINED,
        ),
        Stage(
            "exec",
            "stages.exec",
            "ExecConfig",
            "any command, with the record of a run",
            None,
            ("output",),
        ),
        Stage(
            "reward-model",
            "train.reward_model",
            "RewardModelConfig",
            "a reward model from preference rows",
            "rewards, as rewards[0].model.path",
            ("model",),
        ),
        Stage(
            "dpo",
            "train.dpo",
            "DpoConfig",
            "preference training: DPO, QRPO and others",
            "generate, as model.path",
            TRAINED,
        ),
    )
}


def find_config_class(name: str) -> type[StageConfig] | None:
    """None for a stage that there is not (any more)."""
    return STAGES[name].load_config_class() if name in STAGES else None


def find_stage(name: str) -> Stage:
    """Errors: UsageError, with the names that there are."""
    if name not in STAGES:
        raise UsageError(f"no stage {name!r}", hint=f"there are: {', '.join(STAGES)}")
    return STAGES[name]


def describe_settings(words: Sequence[str]) -> list[str]:
    """Lines for a terminal. words: a stage (all its settings, a line each), or a stage and a key
    (that setting and those below it, with what they mean).

    Errors: UsageError.
    """
    if not 1 <= len(words) <= 2:
        raise UsageError("name one stage and at most one key", hint=f"stages: {', '.join(STAGES)}")
    model = find_stage(words[0]).load_config_class()
    if len(words) == 2:
        return explain_lines(find_settings(model, words[1]))
    return [*list_lines(list(list_settings(model))), "", "With a KEY, its meaning is told too."]
