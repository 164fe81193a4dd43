"""What tests of the host side share: the command line, and the image built from these sources."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from helpers.sums import write_sums
from post_training.core.hashing import ARTIFACT_RECORD, sha256_file
from post_training.images.base import ensure_base
from post_training.images.edf import load_edf
from post_training.images.recipe import load_recipe
from post_training.images.store import ImageStore, default_store
from post_training.records.run_record import identity_of, read_record, seal

# A machine may be busy: no test asserts a time.
settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")

REPOSITORY = Path(__file__).parents[1]
# What a run's record says at its end alone.
END = ("status", "reason", "attempts", "outputs", "metrics")
RENDERED_EDF = REPOSITORY / "edf/post-training.toml"


def pytest_itemcollected(item: pytest.Item) -> None:
    """`make test` runs what needs no image while the image is built."""
    if "image_edf" in getattr(item, "fixturenames", ()):
        item.add_marker("image")


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
    assert RENDERED_EDF.exists(), "no image: run `make image push-sqsh` first"
    recipe = load_recipe("cpu", REPOSITORY)
    expected = recipe.input_hash(ensure_base(recipe, ImageStore(default_store())).sha256)
    pinned = load_edf(RENDERED_EDF, os.environ, REPOSITORY).env
    assert pinned["POST_TRAINING_IMAGE_INPUT_HASH"] == expected, (
        "the rendered image is of other sources: run `make image push-sqsh` first"
    )
    return RENDERED_EDF


@pytest.fixture
def forge() -> Callable[..., None]:
    """forge(run_dir, change): change the record and all that is a digest of it, as nobody does by a
    slip. What is left to tell is running it again."""

    def rewrite(run_dir: Path, change: Callable[[dict], None]) -> None:
        record = read_record(run_dir)
        change(record)
        for name in record["outputs"]["run_files"]:
            record["outputs"]["run_files"][name] = sha256_file(run_dir / name)
        record["identity"] = identity_of(record)
        for made in record["outputs"]["artifacts"].values():
            path = run_dir / made["path"] / ARTIFACT_RECORD
            artifact = json.loads(path.read_text())
            made_by = artifact["made_by"]
            made_by |= {key: record[key] for key in made_by if key in record and key not in END}
            artifact["made_by"]["seal"] = seal(made_by)
            path.write_text(json.dumps(artifact))
        (run_dir / "run.json").write_text(json.dumps({**record, "seal": seal(record)}))

    return rewrite


@pytest.fixture
def committed_image(image_edf, tmp_path) -> Iterator[tuple[ImageStore, dict, Path]]:
    """A store with the record of the built image, as if it was built from the commit of a checkout
    elsewhere with the same sources; that record and the checkout."""
    checkout = tmp_path / "checkout"
    for name in ("containers", "entrypoints", "edf", "src", "tests"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    (checkout / "edf/post-training.toml").unlink()
    git = ["git", "-C", checkout, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True).stdout
    real = ImageStore(default_store())
    digest = load_edf(image_edf, os.environ, tmp_path).env["POST_TRAINING_IMAGE_SQSH_SHA256"]
    record = real.record(digest)
    record = {**record, "checkout": {"commit": commit.decode().strip(), "dirty": False}}
    # On the file system of the real store, whose files are linked.
    with tempfile.TemporaryDirectory(prefix=".test-", dir=real.folder) as folder:
        store = ImageStore(Path(folder))
        for name in ("bases", "wheels"):
            (store.folder / name).symlink_to(real.folder / name)
        with store.lock():
            for path in real.files(record):
                (store.folder / path.name).symlink_to(path)
            store.add(record)
        yield store, record, checkout


@pytest.fixture
def inside(post_training: Run, image_edf: Path) -> Run:
    """Run a command inside the image, in an empty folder that is mounted."""

    def run(*command: str | Path, **keywords):
        return post_training("edf", "run", image_edf, "--", *command, **keywords)

    return run


@pytest.fixture(scope="session")
def job(image_edf, cli, tmp_path_factory) -> Path:
    """A folder with data, configurations, and what init-model and sft left in `init` and `run`."""
    folder = tmp_path_factory.mktemp("job")
    write_sums(folder)
    for stage in ("init-model init.yaml", "sft sft.yaml"):
        done = subprocess.run(
            [cli, "edf", "run", image_edf, "--", "entrypoint", *stage.split()],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder
