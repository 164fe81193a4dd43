"""`post-training experiment new NAME`: a folder with a pipeline that runs, to be made one's own."""

import re
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.core.files import atomic_directory

TEMPLATE = Path(__file__).with_name("experiment_template")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def new_experiment(name: str, parent: Path) -> Path:
    """Its folder. Errors: UsageError for a name that cannot be, or is taken."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"must be small letters, digits and hyphens (got {name!r})", where="NAME")
    folder = parent / name
    if folder.exists():
        raise UsageError("there already", where=str(folder), hint="choose another name")
    with atomic_directory(folder) as made:
        for file in sorted(TEMPLATE.iterdir()):
            (made / file.name).write_text(file.read_text().replace("NAME", name))
    return folder
