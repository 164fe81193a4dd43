"""Every test runs somewhere: on the host, or inside the image by tests/inside-image."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))
INSIDE_IMAGE = ["tests/stages", "tests/unit/data"]


def test_inside_image_runs_these_folders():
    assert " ".join(INSIDE_IMAGE) in (TESTS / "inside-image").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_file_that_needs_the_stack_is_marked_and_lies_where_the_image_runs_it(path: Path):
    """A host, which has no stack, skips it; the image runs what is marked."""
    text = path.read_text()
    is_marked = "pytest.mark.stack" in text and path != Path(__file__)
    if re.search(r"^(\w+ = )?pytest\.importorskip\(", text, re.MULTILINE):
        assert is_marked
    if is_marked:
        assert str(path.relative_to(TESTS.parent)).startswith(tuple(f"{f}/" for f in INSIDE_IMAGE))
