"""The auxiliary loss of a mixture of experts, which keeps its router from preferring a few.

    aux = E · Σ_e f_e · P_e       f_e: share of the tokens sent to expert e, of E (times top_k)
                                  P_e: mean probability that the router gives it
                                  (Switch Transformer, https://arxiv.org/abs/2101.03961, (4) to (6))

It is transformers' own function on the router's own logits, over the tokens of one forward pass of
the model: those that are no padding. It is no sum over tokens, so it depends on the micro-batch.
As in TRL, it is trained where config.json has a router_aux_loss_coef that is not 0.
"""

import inspect
import sys
from typing import Any, ClassVar

from jaxtyping import Bool, Float32
from torch import Tensor
from transformers import PreTrainedModel

from post_training.core.errors import PostTrainingError

_FUNCTION = "load_balancing_loss_func"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


class RouterLoss:
    """coefficient: of the loss, from config.json. arguments: of the model's forward pass, which
    then also gives what `of` needs."""

    arguments: ClassVar[dict[str, bool]] = {"output_router_logits": True}

    def __init__(self, model: PreTrainedModel):
        self.coefficient = coefficient_of(model)
        self._function = getattr(sys.modules[type(model).__module__], _FUNCTION)
        self._num_experts, self._top_k = model.num_experts, model.num_experts_per_tok

    @classmethod
    def for_model(cls, model: Any) -> "RouterLoss | None":
        """model: plain, or with an adapter. None where there is no such loss to train."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        return cls(plain) if coefficient_of(plain) and _gives_one(plain) else None

    def of(self, outputs: Any, is_token: Bool[Tensor, "B T"]) -> Float32[Tensor, ""]:
        """aux. outputs: of the forward pass. is_token: no padding."""
        if not outputs.router_logits:
            raise PostTrainingError(
                "the model gave no router logits, so its router's loss can't be trained",
                where="model",
                hint="set router_aux_loss_coef: 0 in its config.json to train without",
            )
        # A packed row has no mask by which the model itself could leave padding out.
        return self._function(
            outputs.router_logits, self._num_experts, self._top_k, is_token.long()
        )


def coefficient_of(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0


def _gives_one(model: PreTrainedModel) -> bool:
    function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
    if function is None or list(inspect.signature(function).parameters) != _PARAMETERS:
        return False
    # A reward model's class stands in the same file, and gives no router logits.
    takes = inspect.signature(type(model).forward).parameters
    return "output_router_logits" in takes and hasattr(model, "num_experts_per_tok")
