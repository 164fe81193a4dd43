"""The gh200 image for real: built from its locks, packed, and run, where need be under emulation.

About an hour on two cores that emulate arm64; a second one for the build from nothing.
"""

import json

import pytest

from helpers.real_images import NEEDS_ARM64, REPOSITORY, pushed_image
from helpers.sums import write_sums
from post_training.core.files import write_atomic
from post_training.images.release import read_releases
from post_training.images.render import render_edf
from post_training.images.store import ImageStore

pytestmark = [pytest.mark.long, pytest.mark.image, NEEDS_ARM64]
MODULES = ("torch", "transformers", "trl", "deepspeed", "vllm")
VERSIONS = f"""
import importlib, json
modules = [importlib.import_module(name) for name in {MODULES}]
from vllm import LLM
import torch
print(json.dumps([torch.version.cuda, *(module.__version__ for module in modules)]))
"""
# With vectors of the length that qemu has by default, this is 0.2.
LARGEST_ERROR = """
import torch
a, b = torch.randn(50, 16), torch.randn(2, 16)
print(float((a @ b.T - (a.double() @ b.double().T)).abs().max()))
"""


@pytest.fixture(scope="module")
def image() -> tuple[ImageStore, dict]:
    """(the store, the record of the image of these sources in it)."""
    return pushed_image("gh200")


@pytest.fixture
def in_gh200(image, tmp_path, post_training):
    """Run a command in the image; the empty folder is mounted."""
    store, record = image
    edf = tmp_path / "gh200.toml"
    write_atomic(edf, render_edf(REPOSITORY / "edf/laptop.toml", record, store))
    return lambda *command: post_training("edf", "run", edf, "--", *command, cwd=tmp_path)


def test_entrypoint_lists_the_stages(in_gh200):
    done = in_gh200("entrypoint", "--help")
    assert done.returncode == 0, done.stderr
    assert "Run one stage of post-training." in done.stdout


def test_packages_are_of_arm64_and_cuda_in_the_locked_versions(image, in_gh200):
    assert in_gh200("uname", "-m").stdout == "aarch64\n"
    done = in_gh200("python", "-c", VERSIONS)
    assert done.returncode == 0, done.stderr
    cuda, *versions = json.loads(done.stdout.splitlines()[-1])
    installed = image[1]["packages"]["python"]
    found = {name: version.split("+")[0] for name, version in zip(MODULES, versions, strict=True)}
    assert found == {name: installed[name] for name in MODULES}
    assert cuda.startswith("13.")


def test_products_of_small_matrices_are_right(in_gh200):
    done = in_gh200("python", "-c", LARGEST_ERROR)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5


def test_sft_trains_two_steps_and_its_record_names_the_image(image, in_gh200, tmp_path):
    write_sums(tmp_path)
    for stage in ("init-model init.yaml", "sft sft.yaml training.max_steps=2"):
        done = in_gh200("entrypoint", *stage.split())
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["image"]["oci_digest"] == image[1]["oci_digest"]
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 2


def test_image_built_again_from_nothing_is_identical(image, post_training):
    store, record = image
    if record["checkout"]["dirty"]:
        pytest.skip("the checkout has changes: an image is built again from its commit")
    words = ("image", "rebuild", record["oci_digest"], "--store", store.folder)
    done = post_training(*words, "--repository", REPOSITORY)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith(f"identical: {record['oci_digest']}")


def test_image_of_released_sources_is_the_released_one(image):
    _, record = image
    released = {each["input_hash"]: each["oci_digest"] for each in read_releases(REPOSITORY)}
    if record["input_hash"] not in released:
        pytest.skip("these sources are not those of a release")
    assert released[record["input_hash"]] == record["oci_digest"]
