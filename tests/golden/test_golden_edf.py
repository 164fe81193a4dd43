"""The rendered EDF of every site file in edf/, and the Singularity script, compared whole."""

from pathlib import Path

import pytest

from post_training.images.render import render_edf, site_files
from post_training.images.store import ImageStore
from post_training.slurm.environment import image_of
from post_training.slurm.singularity import render_script
from post_training.slurm.site import load_site

REPOSITORY = Path(__file__).parents[2]
RECORD = {
    "name": "cpu",
    "version": "1.2.3",
    "input_hash": "1" * 64,
    "oci_digest": "sha256:" + "2" * 64,
    "sqsh_sha256": "3" * 64,
    "sif_sha256": "6" * 64,
    "registries": {"ghcr.io/me/post-training": "sha256:" + "7" * 64},
}
STORE = ImageStore(Path("/store"))
SITES = [path.stem for path in site_files(REPOSITORY)]


@pytest.mark.parametrize("site", SITES)
def test_render_edf_of_site_is_the_golden_file(site, golden):
    image = image_of(RECORD, STORE, load_site(site, {}).launcher)
    text = render_edf(REPOSITORY / "edf" / f"{site}.toml", RECORD, STORE, image)
    golden(f"edf/{site}.toml", text)


def test_render_singularity_script_of_lumi_is_the_golden_file(golden):
    launcher = load_site("lumi", {}).launcher
    golden(
        "edf/lumi.sh", render_script("lumi", launcher, REPOSITORY / "edf/lumi.toml", RECORD, STORE)
    )
