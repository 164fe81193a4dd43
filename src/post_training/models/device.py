"""Where and how a model computes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from post_training.core.errors import PostTrainingError


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


# Architectures that fail in transformers' or PEFT's own code when they are trained or scored here:
# their outputs are of another kind than the loss expects. That is told in a line, with the folder;
# what fails in our code keeps its traceback.


# What Python and the libraries raise at a value of another kind than they expect. Only those count
# that were raised in a library's own file.
_FAULTS = (AttributeError, TypeError, KeyError, IndexError, ValueError, NotImplementedError)
_LIBRARIES = re.compile(r"/site-packages/(transformers/models|transformers/integrations|peft)/")


@contextmanager
def explained_forward(model: Any, folder: Path) -> Iterator[None]:
    """Errors: PostTrainingError for what the model's own code raised."""
    try:
        yield
    except (*_FAULTS, RuntimeError) as error:
        # Subclasses of RuntimeError are lost ranks and full memories, which may pass.
        is_one = isinstance(error, _FAULTS) or type(error) is RuntimeError
        if not is_one or not _LIBRARIES.search(_last_file(error.__traceback__)):
            raise
        line = (str(error).strip() or "no reason given").splitlines()[0]
        raise PostTrainingError(
            f"models of the type {model.config.model_type} can't be used so: "
            f"{type(error).__name__}: {line}",
            where=str(folder),
        ) from error


def _last_file(trace: TracebackType | None) -> str:
    file = ""
    while trace is not None:
        file, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return file
