"""`post-training doctor` and `storage …`: what a machine has."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from post_training.cli.options import GROUP, Artifact, Json, SiteName, Store

storage_app = typer.Typer(help="Scratch, and what must outlive it.", **GROUP)


def examine_machine(
    site: Annotated[str, typer.Option(help="laptop, clariden, lumi, …")] = "laptop",
    store: Store = None,
) -> None:
    """Say what of this machine is not ready for a site's jobs; exit 1 if anything is wrong."""
    from post_training.images.doctor import print_findings
    from post_training.images.store import open_store
    from post_training.slurm.doctor import examine_host

    sys.exit(print_findings(examine_host(site, open_store(store))))


@storage_app.command("setup")
def storage_setup(
    site: SiteName,
    group: Annotated[
        str | None, typer.Option(help="Who shares it, by default as the folder has it.")
    ] = None,
) -> None:
    """Make artifacts/{private,shared,store}: folders of the site, and links to them."""
    from post_training.slurm import storage
    from post_training.slurm.site import load_site

    storage.setup(site, load_site(site, {}), group)


@storage_app.command("promote")
def storage_promote(
    folder: Artifact,
    name: Annotated[str | None, typer.Option(help="Of the copy.", show_default=False)] = None,
) -> None:
    """Copy an artifact to artifacts/store, every file compared."""
    from post_training.slurm import storage

    storage.promote(folder, name)


@storage_app.command("doctor")
def storage_doctor(
    site: SiteName,
    folder: Annotated[Path, typer.Argument(help="On scratch.")] = Path("."),
    margin: Annotated[int, typer.Option(min=0, help="Days before the deletion.")] = 7,
    as_json: Json = False,
) -> None:
    """Warn of files that the site is about to delete: exit 1 when there are any."""
    from post_training.slurm import storage
    from post_training.slurm.site import load_site

    sys.exit(storage.doctor(folder, site, load_site(site, {}), margin, as_json=as_json))
