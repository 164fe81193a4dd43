"""Whose log-probabilities the inputs hold: what `entrypoint logprobs` left beside their rows."""

from collections.abc import Sequence
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.data.config import DatasetConfig
from post_training.models.reference import REFERENCE, Reference


def common_reference(datasets: Sequence[DatasetConfig]) -> Reference | None:
    """None where no dataset has one. Errors: UsageError where they have different ones."""
    folders = [_folder(dataset.path) for dataset in datasets if dataset.path is not None]
    references = {folder: Reference.read(folder) for folder in folders}
    if len(folders) < len(datasets) and any(references.values()):
        references[Path("the hub")] = None
    first, *others = references or {Path(): None}
    for other in others:
        if references[other] != references[first]:
            raise UsageError(
                f"the reference log-probabilities of {first} and {other} are of different models "
                f"or backends, or one has no {REFERENCE}",
                where="data.datasets",
                hint="run `entrypoint logprobs` once for all of them",
            )
    return references[first] if references else None


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
