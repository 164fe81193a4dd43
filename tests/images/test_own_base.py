"""A recipe over one of our images: pinned by digest, built by the real builder; the base comes from
a real registry."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.registry import serving
from helpers.small_images import COMMIT, forget_images, make_image
from post_training.core.errors import UsageError
from post_training.images import builder
from post_training.images.build import build_image
from post_training.images.identity import read_image
from post_training.images.own_base import lock_own_base, read_own_base
from post_training.images.push import mounted_image, pack_sqsh
from post_training.images.recipe import load_recipe
from post_training.images.share import push_image
from post_training.images.store import ImageStore

pytestmark = [pytest.mark.image, pytest.mark.usefixtures("storage")]
REPOSITORY = Path(__file__).parents[2]
SETTINGS = 'base = "cpu"\nplatform = "linux/amd64"\npython = "3.11"\nglibc = "2.36"\n'
DOCKERFILE = """ARG BASE
FROM ${BASE}
COPY more image.json /etc/post-training/
ARG INPUT_HASH
LABEL org.post-training.input-hash=$INPUT_HASH
"""


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def base(tmp_path, store) -> dict:
    """The record of a cpu image in the store and in the builder's storage."""
    return pack_sqsh(make_image(tmp_path / "one", "one"), store, COMMIT)


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout/containers/over"
    folder.mkdir(parents=True)
    for name, text in (("Dockerfile", DOCKERFILE), ("recipe.toml", SETTINGS), ("more", "more")):
        (folder / name).write_text(text)
    return tmp_path / "checkout"


@pytest.fixture
def image_command(post_training, checkout, store):
    """image_command("build"): `post-training image build over` in this checkout and store."""

    def run(verb: str, *words: object):
        return post_training(
            "image", verb, *words, "--repository", checkout, "--store", store.folder
        )

    return run


def test_image_over_ours_is_locked_built_and_pushed(base, checkout, store, image_command):
    done = image_command("lock", "over")
    assert done.returncode == 0, done.stderr
    digest = base["oci_digest"]
    assert read_own_base(load_recipe("over", checkout))["oci_digest"] == digest
    done = image_command("build", "over")
    assert done.returncode == 0, done.stderr
    image, is_new = build_image(load_recipe("over", checkout), store)
    assert (image.oci_digest, is_new) == (done.stdout.strip(), False)
    record = pack_sqsh(image, store, COMMIT)
    assert (record["base_sha256"], record["base"]) == (digest.removeprefix("sha256:"), "locked")
    with store.lock(), mounted_image(image.tag, store) as root:
        assert (root / "word").read_text() == "one"
        assert read_image(root)["name"] == "over"


def test_base_stays_the_locked_one_until_it_is_locked_again(base, checkout, store, tmp_path):
    recipe = load_recipe("over", checkout)
    lock_own_base(recipe, "cpu", store)
    first, _ = build_image(load_recipe("over", checkout), store)
    other = pack_sqsh(make_image(tmp_path / "two", "two"), store, COMMIT)
    builder.remove(first.tag)
    again, is_new = build_image(load_recipe("over", checkout), store)
    assert (is_new, again.oci_digest) == (True, first.oci_digest)
    lock_own_base(recipe, "cpu", store)
    moved, _ = build_image(load_recipe("over", checkout), store)
    assert moved.identity["base_sha256"] == other["oci_digest"].removeprefix("sha256:")
    assert moved.oci_digest != first.oci_digest
    lock_own_base(recipe, base["oci_digest"], store)
    assert build_image(load_recipe("over", checkout), store)[0].oci_digest == first.oci_digest


def test_base_that_the_builder_lacks_comes_from_its_registry(base, checkout, store, tmp_path):
    """And gives the same image: the name from which it came is not in it."""
    lock_own_base(load_recipe("over", checkout), "cpu", store)
    first, _ = build_image(load_recipe("over", checkout), store)
    forget_images()
    with pytest.raises(UsageError, match=r"the builder does not have cpu 1\.2\.3") as error:
        build_image(load_recipe("over", checkout), store)
    assert "base.lock names no registry" in error.value.problem
    make_image(tmp_path / "again", "one")
    with serving(tmp_path / "registry") as registry:
        push_image(base, f"{registry.host}/me/cpu", store)
        forget_images()
        lock_own_base(load_recipe("over", checkout), "cpu", store)
        pulled, _ = build_image(load_recipe("over", checkout), store)
    assert pulled.oci_digest == first.oci_digest


def test_image_over_ours_is_rebuilt_from_nothing_but_its_base(
    base, checkout, store, image_command, tmp_path, monkeypatch
):
    """By its commit, in a storage of its own."""
    for name in ("src", "entrypoints", "edf"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    lock_own_base(load_recipe("over", checkout), "cpu", store)
    git = ["git", "-C", checkout, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setenv("EDF_PATH", str(tmp_path / "edf"))
    for words in (["build", "over"], ["push-sqsh", "over"], ["rebuild", "over"]):
        done = image_command(*words)
        assert done.returncode == 0, done.stderr
    record = store.find("over")
    assert done.stdout.startswith(f"identical: {record['oci_digest']}")
    # Over a base that no commit names: what was locked since, and not committed.
    pack_sqsh(make_image(tmp_path / "two", "two"), store, COMMIT)
    lock_own_base(load_recipe("over", checkout), "cpu", store)
    for words in (["build", "over"], ["push-sqsh", "over"]):
        assert image_command(*words).returncode == 0
    done = image_command("rebuild", "over")
    assert (done.returncode, store.find("over")["checkout"]["dirty"]) == (2, True)
    assert "which nobody kept" in done.stderr
    # The EDF `post-training` stays that of the base.
    assert (tmp_path / "edf/post-training-over.toml").is_symlink()
    assert not (tmp_path / "edf/post-training.toml").exists()


@pytest.mark.parametrize("since", ["locked", "built and locked again"])
def test_gc_keeps_the_base_of_a_recipe_and_of_an_image(
    base, checkout, store, image_command, tmp_path, since
):
    recipe = load_recipe("over", checkout)
    lock_own_base(recipe, "cpu", store)
    if since != "locked":
        pack_sqsh(build_image(recipe, store)[0], store, COMMIT)
    pack_sqsh(make_image(tmp_path / "two", "two"), store, COMMIT)
    if since != "locked":
        lock_own_base(recipe, "cpu", store)
    (tmp_path / "runs").mkdir()
    done = image_command("gc", tmp_path / "runs", "--json", "--delete")
    assert done.returncode == 0, done.stderr
    found = {image["oci_digest"]: image["kept_for"] for image in json.loads(done.stdout)["images"]}
    assert found[base["oci_digest"]] == "the base of a recipe or of another image"
    assert base["oci_digest"] in builder.stored_tags().values()


@pytest.mark.parametrize("change", [{"name": "gh200"}, {"platform": "linux/arm64"}])
def test_base_of_another_name_or_platform_is_refused(base, checkout, store, change):
    [(key, value)] = change.items()
    with store.lock():
        store.add({**base, key: value})
    with pytest.raises(UsageError, match=f"its {key} is {value}, recipe.toml asks for"):
        lock_own_base(load_recipe("over", checkout), base["oci_digest"], store)
    assert not (checkout / "containers/over/base.lock").exists()


def test_context_of_a_recipe_over_ours_is_refused(base, checkout, store, image_command, tmp_path):
    lock_own_base(load_recipe("over", checkout), "cpu", store)
    done = image_command("context", "over", tmp_path / "context")
    assert (done.returncode, (tmp_path / "context").exists()) == (2, False)
    assert "its base is one of our images, which the context can't hold" in done.stderr


def test_packages_of_the_distribution_over_ours_are_refused(base, checkout, image_command):
    (checkout / "containers/over/system.in").write_text("htop\n")
    done = image_command("lock", "over")
    assert done.returncode == 2
    assert "can't be added to an image of ours" in done.stderr
