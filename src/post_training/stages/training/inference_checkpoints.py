"""Models for inference along the way: RUN/inference_checkpoints/step-N, or a folder elsewhere."""

from pathlib import Path

from post_training.core.errors import UsageError
from post_training.stages.leftovers import remove_leftovers

INFERENCE_CHECKPOINTS = "inference_checkpoints"


def open_inference_checkpoints(run_dir: Path, elsewhere: Path | None) -> None:
    """Make RUN/inference_checkpoints a link to `elsewhere`, if that is given, and remove what a
    killed attempt left half-written there. For rank 0 alone.

    Errors: UsageError when that folder holds something already, or the run's own is another one.
    """
    folder = run_dir / INFERENCE_CHECKPOINTS
    if elsewhere is not None:
        _link(folder, elsewhere.absolute())
    remove_leftovers(folder, "*")


def _link(folder: Path, place: Path) -> None:
    where = "checkpointing.inference_checkpoint_path"
    if folder.is_dir():
        if folder.resolve() != place.resolve():
            raise UsageError(f"this run has them in {folder.resolve()} (got {place})", where=where)
        return
    place.mkdir(parents=True, exist_ok=True)
    if held := next(place.iterdir(), None):
        problem = f"{place} holds {held.name} already, which is none of this run's"
        raise UsageError(problem, where=where, hint="give each run a folder of its own")
    folder.unlink(missing_ok=True)  # a link to a folder that was taken away
    folder.symlink_to(place)
