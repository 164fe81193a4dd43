"""Host commands that need the training stack run themselves again inside the image."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.images import edf_command
from post_training.images.identity import IMAGE_FILE


def can_run_here(environment: str | None) -> bool:
    """Whether this is an image, or the stack is installed and no EDF is named."""
    return IMAGE_FILE.exists() or (environment is None and find_spec("transformers") is not None)


def enter_image(environment: str | None, written: Mapping[str, Path | None]) -> None:
    """Replace this process by the same command in an EDF's image, by default post-training's. Come
    back where it can run already: in an image, or where the stack is installed and no EDF is named.

    written: by option, what the command writes.
    Errors: UsageError for what would be lost with the container.
    """
    if can_run_here(environment):
        return
    for option, path in written.items():
        if path is not None and not path.resolve().is_relative_to(Path.cwd().resolve()):
            raise UsageError(
                f"{option}: must be below the working directory, which the image sees (got {path})"
            )
    command = ["run", environment or "post-training", "--", "post-training", *sys.argv[1:]]
    sys.exit(edf_command.main(command))
