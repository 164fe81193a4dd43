"""`image passport`: one image in all its forms, or what differs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from helpers.registry import serving
from helpers.small_images import COMMIT, forget_images, make_image
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import sha256_file
from post_training.images.edf import load_edf
from post_training.images.passport import make_passport, tree_hash
from post_training.images.push import (
    PARTITION_AT,
    make_squashfs,
    pack_sqsh,
    sif_partition,
    write_sif,
)
from post_training.images.share import push_image
from post_training.images.store import ImageStore

pytestmark = pytest.mark.image


def test_passport_of_the_real_image_is_one_image_that_starts_in_each_form(image_edf, post_training):
    digest = load_edf(image_edf, os.environ, Path("/")).env["POST_TRAINING_IMAGE_SQSH_SHA256"]
    done = post_training("image", "passport", digest, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["differences"] == []
    forms = {form["name"]: form for form in made["forms"]}
    for name in ("OCI", "squashfs"):
        assert forms[name]["started"] is True, forms[name]
        assert forms[name]["tree"] == forms["OCI"]["tree"] is not None
        assert forms[name]["entrypoint"] == sha256_file(Path("entrypoints/entrypoint").absolute())
        assert forms[name]["environment"]["VIRTUAL_ENV"] == "/opt/post-training/venv"
    assert forms["SIF"]["tree"] in (None, forms["OCI"]["tree"])


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def record(tmp_path, storage, store) -> dict:
    return pack_sqsh(make_image(tmp_path / "one", "one"), store, COMMIT)


def forms_of(record, store):
    made = make_passport(record, store)
    return {form.name.split()[0]: form for form in made.forms}, made.differences


def test_passport_of_small_image_in_a_registry_and_of_what_cannot_be_had(record, store, tmp_path):
    """It has no shell, so nothing starts; and no variables where the runner looks for them."""
    with serving(tmp_path / "registry") as registry:
        push_image(record, f"{registry.host}/me/cpu", store)
        forms, differences = forms_of(store.find("cpu"), store)
    assert differences == []
    assert list(forms) == ["OCI", "squashfs", "SIF", "registry"]
    assert forms["OCI"].tree == forms["squashfs"].tree
    assert forms["OCI"].started is None
    assert any(note.startswith("not started: ") for note in forms["OCI"].notes)
    assert forms["SIF"].notes == ["`post-training image push-sif cpu` makes one"]
    assert forms["registry"].notes == []
    forms, differences = forms_of(store.find("cpu"), store)
    assert differences == []  # The registry is gone, which is no difference.
    assert forms["registry"].notes == ["the registry does not answer"]
    forget_images()
    forms, _ = forms_of(store.find("cpu"), store)
    assert forms["OCI"].notes == ["it is not in the builder's storage"]


def test_passport_of_another_squashfs_differs(record, store, tmp_path, post_training):
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/environment").write_text("PATH=/bin\nWORD=two\n")
    make_squashfs(tmp_path / "tree", tmp_path / "other.sqsh", record["oci_digest"])
    shutil.move(tmp_path / "other.sqsh", store.image_path(record["sqsh_sha256"]))
    done = post_training("image", "passport", "cpu", "--store", store.folder)
    assert done.returncode == 4
    assert done.stdout.splitlines()[-1] == "differs"
    assert "error: squashfs: its tree is not that of the OCI: " in done.stderr
    assert "its environment is not that of the OCI: WORD is 'one', then 'two'" in done.stderr


def test_tree_hash_sees_content_mode_links_and_names_and_not_times(tmp_path):
    def make(name: str) -> Path:
        root = tmp_path / name
        (root / "etc/post-training").mkdir(parents=True)
        (root / "a").write_text("one")
        (root / "link").symlink_to("a")
        return root

    first, other = make("first"), make("other")
    os.utime(other / "a", (1, 1))
    (other / "etc/post-training/oci-digest").write_text("of the squashfs alone")
    expected = tree_hash(first)
    assert tree_hash(other) == expected

    def change_link() -> None:
        (other / "link").unlink()
        (other / "link").symlink_to("b")

    changes = [
        lambda: (other / "a").write_text("two"),
        lambda: (other / "a").chmod(0o755),
        change_link,
        lambda: (other / "b").mkdir(),
        lambda: os.chown(other / "a", 1, 1),
    ]
    seen = {expected}
    for change in changes:
        change()
        seen.add(tree_hash(other))
    assert len(seen) == len(changes) + 1


def test_sif_partition_is_found_by_the_table(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/word").write_text("one")
    make_squashfs(tmp_path / "tree", tmp_path / "x.sqsh")
    write_sif(tmp_path / "x.sqsh", tmp_path / "x.sif", platform="linux/amd64", labels={},
              environment={})  # fmt: skip
    expected = (PARTITION_AT, sha256_file(tmp_path / "x.sqsh"))
    assert sif_partition(tmp_path / "x.sif") == expected
    (tmp_path / "short").write_text("no SIF")
    with pytest.raises(PostTrainingError, match="not a SIF"):
        sif_partition(tmp_path / "short")
