"""Where and how a model computes, and what is told of one that can't."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from post_training.core.errors import PostTrainingError

# What Python and the libraries raise at a value of another kind than they expect. Only those count
# that were raised in a library's own file.
_FAULTS = (AttributeError, TypeError, KeyError, IndexError, ValueError, NotImplementedError)
_LIBRARIES = re.compile(r"/site-packages/(transformers/models|transformers/integrations|peft)/")


def be_deterministic() -> None:
    """What is computed from here on is the same each time, or an error."""
    # Both are read when a GPU is first used: the workspace of cuBLAS that gives the same sums each
    # time, and flash attention's backward pass.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, at a price


def move_to_device(model: PreTrainedModel, local_rank: int) -> PreTrainedModel:
    """For inference, deterministic, on this process's GPU, or on the CPU where there is none."""
    be_deterministic()
    if torch.cuda.is_available():
        model = model.to(torch.device("cuda", local_rank % torch.cuda.device_count()))
    return model.eval()


@contextmanager
def explain_model_errors(model: Any, folder: Path) -> Iterator[None]:
    """Tell in a line, with the folder, what fails in transformers' or PEFT's own code: there are
    architectures whose outputs are of another kind than ours expects. What fails in our code keeps
    its traceback.

    Errors: PostTrainingError for what the model's own code raised.
    """
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
    """Where an error was raised."""
    file = ""
    while trace is not None:
        file, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return file
