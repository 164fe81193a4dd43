"""The configuration of `entrypoint dpo`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from post_training.config.model import Config, Role, not_default
from post_training.data.config import PairConfig
from post_training.stages.training.evaluation_config import EvaluatedStageConfig

OF_QRPO = ("normalize_loss_by_length", "quantile_transform")


class LossConfig(Config):
    """name: one of losses.py. beta: how much it costs to leave the reference.

    normalize_beta_by_length: each answer's beta is divided by its number of tokens; dpo-norm is dpo
    with it. label_smoothing: the share of pairs that are taken to be labelled the wrong way round.
    quantile_transform, normalize_loss_by_length: of qrpo: f, and whether the squared error of an
    answer is divided by its number of tokens.
    """

    name: Literal["dpo", "dpo-norm", "ipo", "hinge", "qrpo"] = "dpo"
    beta: PositiveFloat
    normalize_beta_by_length: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    quantile_transform: Literal["identity", "log", "square", "sqrt", "normal"] = "identity"
    normalize_loss_by_length: bool = False

    @property
    def beta_is_per_length(self) -> bool:
        return self.normalize_beta_by_length or self.name == "dpo-norm"

    @model_validator(mode="after")
    def _only_what_counts(self) -> "LossConfig":
        if self.name != "qrpo" and (of_qrpo := not_default(self, OF_QRPO)):
            raise ValueError(f"{of_qrpo[0]} is a setting of qrpo (name is {self.name})")
        if self.label_smoothing and self.name not in ("dpo", "dpo-norm"):
            raise ValueError(f"label_smoothing is a setting of dpo (name is {self.name})")
        return self


class ReferenceConfig(Config):
    """Where the reference's logprobs come from; its weights are never in memory with the policy's.

    logprobs: `stored` in the dataset (ref_chosen_logprob, ref_rejected_logprob); `computed` in a
    pass before training; `auto`: stored where every pair has them, and computed where none has.
    ref_model_name_or_path: a model folder to compute them with; by default model.path.
    tolerance: by how many nats a token a stored logprob may differ from what the untouched model
    gives in the first step; default: 0.001, and 0.03 where the model computes in 16 bits.
    """

    logprobs: Literal["auto", "stored", "computed"] = "auto"
    ref_model_name_or_path: Annotated[Path | None, Role.INPUT] = None
    tolerance: Annotated[NonNegativeFloat | None, Role.PLACEMENT] = None

    @model_validator(mode="after")
    def _a_model_computes(self) -> "ReferenceConfig":
        if self.ref_model_name_or_path is not None and self.logprobs == "stored":
            raise ValueError("ref_model_name_or_path: only where logprobs are computed")
        return self


class DpoConfig(EvaluatedStageConfig):
    version: ClassVar[int] = 2

    dpo: PairConfig
    loss: LossConfig
    reference: ReferenceConfig = ReferenceConfig()

    @property
    def rows_are_packed(self) -> bool:
        return self.dpo.packing != "none"

    @model_validator(mode="after")
    def _pairs(self) -> "DpoConfig":
        if self.data.indexed:
            raise ValueError("data: set datasets or prepared; indexed documents have no pairs")
        return self

    @model_validator(mode="after")
    def _mask_of_a_shared_prompt(self) -> "DpoConfig":
        if self.dpo.share_prompt and self.model.attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "dpo.share_prompt: its mask needs model.attn_implementation: sdpa or eager"
            )
        return self
