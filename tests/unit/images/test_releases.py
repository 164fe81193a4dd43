"""containers/images.lock: what it says of an image is what the image's commit gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.images.checkout import has_commit, worktree
from post_training.images.release import read_releases

REPOSITORY = Path(__file__).parents[3]
RELEASES = read_releases(REPOSITORY)
# By the code of that commit: how an input hash is made may change.
INPUT_HASH = """
import json, pathlib, sys
from post_training.images.recipe import load_recipe
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
recipe = load_recipe(name, folder)
base = json.loads((folder / "containers" / name / "base.lock").read_text())["sha256"]
print(recipe.version, base, recipe.input_hash(base))
"""


@pytest.mark.parametrize("entry", RELEASES, ids=lambda entry: f"{entry['name']}-{entry['version']}")
def test_released_commit_has_the_inputs_that_its_entry_says(entry, tmp_path):
    if not has_commit(REPOSITORY, entry["commit"]):
        pytest.skip(f"this clone does not have commit {entry['commit']}")
    with worktree(REPOSITORY, entry["commit"], tmp_path / "checkout") as sources:
        done = subprocess.run(
            [sys.executable, "-c", INPUT_HASH, entry["name"], sources],
            env={**os.environ, "PYTHONPATH": str(sources / "src")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [entry["version"], entry["base_sha256"], entry["input_hash"]]


def test_a_version_of_an_image_is_released_once():
    versions = [(entry["name"], entry["version"], entry["platform"]) for entry in RELEASES]
    assert len(set(versions)) == len(versions)
