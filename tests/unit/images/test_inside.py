"""What the inside of an image says of paths that are not there."""

from pathlib import Path

import pytest

from post_training.images.inside import explain_missing

MOUNTED = ["/work/me:/work/me", "/data:/d:ro"]


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/models/Apertus", "/models/Apertus is not below a folder that is mounted in the image "
         "(/work/me, /d): `post-training edf run --mount /models/Apertus:/models/Apertus …`"),
        ("/data/x", "/data/x is not below"),  # It is mounted as /d.
        ("org/name-1.5B", "org/name-1.5B looks like a name on the Hugging Face hub"),
    ],
)  # fmt: skip
def test_explain_missing_says_what_may_be_the_matter(path, start):
    assert explain_missing(Path(path), MOUNTED).startswith(start)


@pytest.mark.parametrize("path", ["/work/me/typo", "/d/typo"])
def test_explain_missing_of_a_mounted_folder_is_none(path):
    assert explain_missing(Path(path), MOUNTED) is None
    assert explain_missing(Path("/models/x"), None) is None  # No image.


def test_explain_missing_of_a_link_names_where_it_leads(tmp_path):
    (tmp_path / "SmolLM2").symlink_to("/models/SmolLM2")
    hint = explain_missing(tmp_path / "SmolLM2", [f"{tmp_path}:{tmp_path}"])
    assert hint.startswith("/models/SmolLM2 is not below")
