"""The rendered EDF of every site file in edf/, compared whole."""

from pathlib import Path

import pytest

from post_training.images.render import RENDERED_NAME, render_edf
from post_training.images.store import ImageStore

REPOSITORY = Path(__file__).parents[2]
RECORD = {
    "name": "cpu",
    "version": "1.2.3",
    "input_hash": "1" * 64,
    "oci_digest": "sha256:" + "2" * 64,
    "sqsh_sha256": "3" * 64,
}
SITES = sorted(p.stem for p in (REPOSITORY / "edf").glob("*.toml") if p.name != RENDERED_NAME)


@pytest.mark.parametrize("site", SITES)
def test_render_edf_of_site_is_the_golden_file(site, golden):
    text = render_edf(REPOSITORY / "edf" / f"{site}.toml", RECORD, ImageStore(Path("/store")))
    golden(f"edf/{site}.toml", text)
