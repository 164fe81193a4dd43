"""What tests of the host side share: the command line, and the image built from these sources."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
RENDERED_EDF = REPOSITORY / "edf/post-training.toml"


@pytest.fixture(scope="session")
def cli() -> Path:
    """The installed `post-training`."""
    return Path(sys.executable).with_name("post-training")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def post_training(cli: Path, tmp_path: Path) -> Run:
    """Run `post-training ARGUMENTS` in an empty folder; further variables by keyword."""

    def run(*arguments: str | Path, cwd: Path = tmp_path, **variables: str):
        return subprocess.run(
            [cli, *arguments],
            cwd=cwd,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def image_edf() -> Path:
    """The EDF of the image built from these very sources; `make image push-sqsh` makes it."""
    from post_training.images.base import ensure_base
    from post_training.images.edf import load_edf
    from post_training.images.recipe import load_recipe
    from post_training.images.store import ImageStore, default_store

    assert RENDERED_EDF.exists(), "no image: run `make image push-sqsh` first"
    recipe = load_recipe("cpu", REPOSITORY)
    expected = recipe.input_hash(ensure_base(recipe, ImageStore(default_store()))["sha256"])
    pinned = load_edf(RENDERED_EDF, os.environ, REPOSITORY).env
    assert pinned["POST_TRAINING_IMAGE_INPUT_HASH"] == expected, (
        "the rendered image is of other sources: run `make image push-sqsh` first"
    )
    return RENDERED_EDF


@pytest.fixture
def inside(post_training: Run, image_edf: Path) -> Run:
    """Run a command inside the image, in an empty folder that is mounted."""

    def run(*command: str | Path, **keywords):
        return post_training("edf", "run", image_edf, "--", *command, **keywords)

    return run
