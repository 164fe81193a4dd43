"""The same recipe, built from nothing in another place, is the same image."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from post_training.images.edf import load_edf
from post_training.images.store import default_store

pytestmark = [pytest.mark.long, pytest.mark.image]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def empty_storage(tmp_path):
    """buildah's storage, without a layer of an earlier build."""
    settings = tmp_path / "storage.conf"
    settings.write_text(
        '[storage]\ndriver = "overlay"\n'
        f'runroot = "{tmp_path}/run"\ngraphroot = "{tmp_path}/root"\n'
    )
    yield settings
    subprocess.run(
        ["buildah", "rmi", "--all", "--force"],
        env={**os.environ, "CONTAINERS_STORAGE_CONF": str(settings)},
        check=True,
    )


def test_image_built_again_from_nothing_has_the_same_digests(
    image_edf, empty_storage, post_training, tmp_path
):
    # In another folder, with another umask; the base and the wheels come by their hashes.
    old_umask = os.umask(0o077)
    for name in ("containers", "entrypoints", "edf", "src"):
        shutil.copytree(REPOSITORY / name, tmp_path / "elsewhere" / name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path / "elsewhere")
    store = tmp_path / "store"
    store.mkdir()
    shutil.copytree(default_store() / "bases", store / "bases", copy_function=os.link)
    shutil.copytree(default_store() / "wheels", store / "wheels", copy_function=os.link)
    options = ["--repository", tmp_path / "elsewhere", "--store", store]
    variables = {"CONTAINERS_STORAGE_CONF": str(empty_storage), "EDF_PATH": str(tmp_path)}
    built = post_training("image", "build", *options, **variables)
    pushed = post_training("image", "push-sqsh", *options, **variables)
    os.umask(old_umask)
    assert built.returncode == pushed.returncode == 0, built.stderr + pushed.stderr

    pinned = load_edf(image_edf, os.environ, tmp_path).env
    listed = post_training("image", "list", "--json", "--store", store).stdout
    [again] = json.loads(listed)
    assert again["oci_digest"] == pinned["POST_TRAINING_IMAGE_OCI_DIGEST"]
    assert again["sqsh_sha256"] == pinned["POST_TRAINING_IMAGE_SQSH_SHA256"]
