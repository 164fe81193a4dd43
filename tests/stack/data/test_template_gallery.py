"""docs/reference/templates.md is what the check says today."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from helpers.real_data import TOKENIZERS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def module() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "make_gallery.py"))


@pytest.mark.long
def test_gallery_says_what_the_check_says_today(module: dict[str, Any]):
    page = (DOCS / "reference/templates.md").read_text(encoding="utf-8")
    ours, title, rows = page.partition(f"\n{module['REAL']}")
    assert module["gallery"]() == ours
    if TOKENIZERS.exists():
        assert module["of_real_tokenizers"]() == title + rows
