import os
import shutil
from pathlib import Path

import pytest

from post_training.images.rebuild import differing_paths


@pytest.fixture
def trees(tmp_path) -> tuple[Path, Path]:
    """Two folders with equal content, modes and times."""
    first = tmp_path / "first"
    for name in ("a", "b", "c", "d", "e/f", "g"):
        (first / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (first / "folder" / name).write_text("text")
    (first / "link").symlink_to("folder")
    shutil.copytree(first, tmp_path / "second", symlinks=True)
    return first, tmp_path / "second"


def differences(trees: tuple[Path, Path]) -> list[str]:
    for path in (path for tree in trees for path in [tree, *tree.rglob("*")]):
        if path.name != "d":
            os.utime(path, (7, 7), follow_symlinks=False)
    return list(differing_paths(*trees))


def test_differing_paths_of_equal_trees_are_none(trees):
    assert differences(trees) == []


def test_differing_paths_name_each_difference_in_order(trees):
    second = trees[1] / "folder"
    (second / "a").write_text("TEXT")
    (second / "b").chmod(0o600)
    (second / "c").write_text("more text")
    os.utime(second / "d", (5, 5))
    os.utime(trees[0] / "folder/d", (6, 6))
    shutil.rmtree(second / "e")
    (second / "g").unlink()
    (second / "g").mkdir()
    (trees[1] / "link").unlink()
    (trees[1] / "link").symlink_to("elsewhere")
    assert differences(trees) == [
        "folder/a: content",
        "folder/b: mode is -rw-r--r--, then -rw-------",
        "folder/c: 4 bytes, then 9",
        "folder/d: time is 6, then 5",
        "folder/e: only in the first",
        "folder/g: file, then folder",
        "link: link to folder, then to elsewhere",
    ]


def test_differing_paths_look_below_a_folder_that_differs_itself(trees):
    (trees[1] / "folder").chmod(0o700)
    (trees[1] / "folder/e/f").write_text("TEXT")
    assert differences(trees) == [
        "folder: mode is drwxr-xr-x, then drwx------",
        "folder/e/f: content",
    ]
