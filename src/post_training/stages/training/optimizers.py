"""The optimizer that a configuration names, as the Trainer wants it: a class and its arguments.

The Trainer gives it two groups of parameters, with and without weight decay. Each optimizer's state
survives a checkpoint bit for bit (tests/stages/test_training_optimizers.py).
"""

from typing import Any

import torch
from transformers import Adafactor

from post_training.stages.training.config import TrainingConfig


def optimizer_class_and_arguments(
    training: TrainingConfig, num_steps: int
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """num_steps: of the whole run."""
    name, settings = training.optimizer, dict(training.optimizer_args)
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    match name:
        case "adamw":
            found, fixed = torch.optim.AdamW, {"fused": True}
        case "adamw_torch":
            found, fixed = torch.optim.AdamW, {"fused": False}
        case "ademamix":
            from pytorch_optimizer import AdEMAMix  # 1.3 s, so only where it is used

            found, fixed = AdEMAMix, {"weight_decouple": True}
            settings["betas"] = (*settings["betas"], settings.pop("beta3"))
            settings.setdefault("t_alpha_beta3", num_steps)
        case "lion":
            from pytorch_optimizer import Lion

            found, fixed = Lion, {"weight_decouple": True}
        case "adafactor":
            # The learning rate is the schedule's.
            found, fixed = Adafactor, {"scale_parameter": False, "relative_step": False}
            settings["eps"] = tuple(settings["eps"])
        case "sgd":
            found, fixed = torch.optim.SGD, {}
        case "rmsprop":
            found, fixed = torch.optim.RMSprop, {}
        case "adagrad":
            found, fixed = torch.optim.Adagrad, {}
    return found, {"lr": training.learning_rate, **settings, **fixed}


def decayed_parameters(model: torch.nn.Module, chosen: list[str]) -> list[str]:
    """Those of the `chosen` names that are matrices: transformers leaves norms and biases out by
    their names, and would let the two numbers of each of Apertus's activations (xIELU) decay."""
    names = set(chosen)
    return [
        name
        for name, parameter in model.named_parameters()
        # Under ZeRO-3 a parameter is empty between uses, and this is what it really is.
        if name in names and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    ]
