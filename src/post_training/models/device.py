"""Where and how a model computes."""

import torch
from transformers import PreTrainedModel


def be_deterministic() -> None:
    """What is computed from here on is the same each time, or an error."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, at a price


def on_device(model: PreTrainedModel, local_rank: int) -> PreTrainedModel:
    """For inference, deterministic, on this process's GPU, or on the CPU where there is none."""
    be_deterministic()
    if torch.cuda.is_available():
        model = model.to(torch.device("cuda", local_rank % torch.cuda.device_count()))
    return model.eval()
