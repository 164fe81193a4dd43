"""`make push-sqsh` on the real image."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from post_training.images.edf import load_edf
from post_training.images.store import default_store

pytestmark = pytest.mark.image
REPOSITORY = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what an image is made of, so that the real EDF is not rendered anew."""
    for name in ("containers", "entrypoints", "edf", "src"):
        shutil.copytree(REPOSITORY / name, tmp_path / "checkout" / name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path / "checkout")
    (tmp_path / "checkout/edf/post-training.toml").unlink()
    return tmp_path / "checkout"


def test_push_again_changes_nothing_and_renders_and_links_the_edf(
    image_edf, checkout, post_training, tmp_path
):
    before = snapshot(default_store())
    folder = tmp_path / "edf folder"
    done = post_training("image", "push-sqsh", "--repository", checkout, EDF_PATH=str(folder))
    assert done.returncode == 0, done.stderr
    assert snapshot(default_store()) == before
    link = folder / "post-training.toml"
    assert link.resolve() == checkout / "edf/post-training.toml"
    assert link.read_text() == image_edf.read_text()
    pinned = load_edf(link, os.environ, tmp_path)
    assert done.stdout.strip() == pinned.image
    assert Path(pinned.image).name == f"sha256-{pinned.env['POST_TRAINING_IMAGE_SQSH_SHA256']}.sqsh"


def test_push_file_in_the_way_of_the_link_is_kept(image_edf, checkout, post_training, tmp_path):
    (tmp_path / "post-training.toml").write_text("mine")
    done = post_training("image", "push-sqsh", "--repository", checkout, EDF_PATH=str(tmp_path))
    assert done.returncode == 1
    assert "is in the way" in done.stderr
    assert (tmp_path / "post-training.toml").read_text() == "mine"


@contextmanager
def small_store(folder: Path, size: str):
    """A store on a file system of `size`, with the base of the real one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        (folder / "bases").symlink_to(default_store() / "bases")
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_push_into_a_full_store_leaves_nothing(image_edf, checkout, post_training, tmp_path):
    with small_store(tmp_path / "small", "200m") as store:
        built = post_training("image", "build", "--repository", checkout)
        assert built.returncode == 0, built.stderr
        done = post_training(
            "image", "push-sqsh", "--repository", checkout, "--store", store, EDF_PATH=str(tmp_path)
        )
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert {path.name for path in store.iterdir()} == {"bases", ".lock"}
        assert not (tmp_path / "post-training.toml").exists()


def test_push_unbuilt_sources_are_refused_with_the_command(checkout, post_training, tmp_path):
    (checkout / "src/post_training/added.py").write_text("")
    done = post_training("image", "push-sqsh", "--repository", checkout, EDF_PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "hint: run `post-training image build cpu` first"


def test_edf_render_equals_the_installed_edf(image_edf, post_training):
    digest = load_edf(image_edf, os.environ, Path("/")).env["POST_TRAINING_IMAGE_OCI_DIGEST"]
    done = post_training("edf", "render", "--image", digest, "--repository", REPOSITORY)
    assert done.stdout == image_edf.read_text()


def test_image_show_has_every_identity(image_edf, post_training):
    env = load_edf(image_edf, os.environ, Path("/")).env
    record = json.loads(
        post_training("image", "show", env["POST_TRAINING_IMAGE_SQSH_SHA256"]).stdout
    )
    assert record["oci_digest"] == env["POST_TRAINING_IMAGE_OCI_DIGEST"]
    assert record["input_hash"] == env["POST_TRAINING_IMAGE_INPUT_HASH"]
    locks = {path.name for path in (REPOSITORY / "containers/cpu").glob("*.lock")}
    assert set(record["lock_sha256"]) == locks
    assert record["builder"]["buildah"].startswith("buildah version")
