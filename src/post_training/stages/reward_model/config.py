"""The configuration of `entrypoint reward-model`."""

from pydantic import NonNegativeFloat, model_validator

from post_training.data.config import DataConfig, PairConfig
from post_training.stages.training.config import TrainingStageConfig

_OF_A_POLICY = ("packing", "max_seq_length", "share_prompt", "num_ref_rewards")


class RewardModelConfig(TrainingStageConfig):
    """data: preference rows. model: a language model, which gets a new output, or a reward model.
    pairs: what is too long; by default a pair that would be cut is left out.
    center_rewards_coefficient: of losses.py; 0: rewards have no fixed zero.
    """

    data: DataConfig
    pairs: PairConfig = PairConfig()
    center_rewards_coefficient: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _pairs_alone(self) -> "RewardModelConfig":
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one")
        defaults = PairConfig()
        for key in _OF_A_POLICY:
            if getattr(self.pairs, key) != getattr(defaults, key):
                raise ValueError(f"pairs.{key}: is for training a policy")
        if self.lora is not None:
            raise ValueError("lora: a reward model is trained whole")
        if self.training.padding_free:
            raise ValueError("training.padding_free: a reward model has one conversation a row")
        if self.distributed.strategy in ("zero3", "fsdp2"):
            raise ValueError("distributed.strategy: a reward model's new output is not divided yet")
        return self
