"""`post-training edf render`: an image and a site become the site's kind of environment."""

import os
from pathlib import Path

from post_training.core.credentials import find_credentials
from post_training.core.errors import UsageError
from post_training.images.edf import edf_folders
from post_training.images.render import install_edf, render_edf, site_file
from post_training.images.store import ImageStore, default_store
from post_training.launch.singularity import render_script, sif_of
from post_training.launch.site import SITES_DIR, Launcher, load_site

FORMS = ("edf", "singularity")


def render(
    reference: str, site: str, form: str | None, store_folder: Path | None, repository: Path
) -> str:
    """The EDF, or the script that starts Singularity. form: else the site's own.

    On a site of Singularity's the EDF names the SIF: `submit` reads it there.
    """
    if form not in (None, *FORMS):
        raise UsageError(f"--as: must be one of {', '.join(FORMS)} (got {form!r})")
    path = site_file(site, repository.resolve())
    store = ImageStore(store_folder or default_store())
    record = store.find(reference)
    launcher = _launcher(site)
    credentials = find_credentials(os.environ)
    if (form or launcher.kind) == "singularity":
        return render_script(site, launcher, path, record, store, credentials)
    image = sif_of(record, store) if launcher.kind == "singularity" else None
    return render_edf(path, record, store, image, credentials)


def install(reference: str, site: str, store_folder: Path | None, repository: Path) -> Path:
    """Write edf/post-training.toml for the site, linked into the user's EDF folder; its path."""
    repository = repository.resolve()
    text = render(reference, site, "edf", store_folder, repository)
    return install_edf(text, repository, edf_folders(os.environ)[0])


def _launcher(site: str) -> Launcher:
    # An EDF of the user's own beside the project's needs no file of a scheduler.
    if not (SITES_DIR / f"{site}.yaml").exists():
        return Launcher(kind="edf")
    return load_site(site, {}).launcher
