"""Architectures that fail in transformers' or PEFT's own code when they are trained or scored here:
their outputs are of another kind than the loss expects. That is told in a line, with the folder;
what fails in our code keeps its traceback."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from post_training.core.errors import PostTrainingError

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
