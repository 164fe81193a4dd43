"""The images of the recipes in containers/, for tests that run them."""

import platform
from pathlib import Path
from typing import Any

import pytest

from post_training.images.build import build_image
from post_training.images.push import push_sqsh
from post_training.images.recipe import load_recipe
from post_training.images.store import ImageStore, default_store

REPOSITORY = Path(__file__).parents[2]
_QEMU = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
NEEDS_ARM64 = pytest.mark.skipif(
    platform.machine() != "aarch64" and not _QEMU.exists(),
    reason="this machine runs no arm64 program: installation/laptop/emulate-arm64",
)


def pushed_image(name: str) -> tuple[ImageStore, dict[str, Any]]:
    """The user's store, and in it the record of the image of these sources; made where missing."""
    store, recipe = ImageStore(default_store()), load_recipe(name, REPOSITORY)
    built, _ = build_image(recipe, store)
    return store, store.find_built(built.identity["input_hash"]) or push_sqsh(built, recipe, store)
