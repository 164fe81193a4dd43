"""`post-training doctor` and `storage …`: what a machine has."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from post_training.cli.options import GROUP, Artifact, Json, SiteName, Store

_MOST_FOLDERS_LISTED = 20

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

    for link, folder in storage.setup(site, load_site(site, {}), group).items():
        print(f"{link} -> {folder}")


@storage_app.command("promote")
def storage_promote(
    folder: Artifact,
    name: Annotated[str | None, typer.Option(help="Of the copy.", show_default=False)] = None,
) -> None:
    """Copy an artifact to artifacts/store, every file compared."""
    from post_training.slurm import storage

    print(storage.promote(folder, name))


@storage_app.command("doctor")
def storage_doctor(
    site: SiteName,
    folder: Annotated[Path, typer.Argument(help="On scratch.")] = Path("."),
    margin: Annotated[int, typer.Option(min=0, help="Days before the deletion.")] = 7,
    as_json: Json = False,
) -> None:
    """Warn of files that the site is about to delete: exit 1 when there are any."""
    from post_training.slurm.site import load_site

    after_days = load_site(site, {}).storage.deleted_after_days
    sys.exit(list_endangered(folder, site, after_days, margin, as_json=as_json))


def list_endangered(
    folder: Path, site_name: str, after_days: int | None, margin_days: int, *, as_json: bool
) -> int:
    """Print the folders with files that the site deletes soon; the exit code, 1 if there are any.

    after_days: the site deletes what was not used for so long; None where it deletes nothing.
    """
    from post_training.slurm.storage import find_endangered

    if after_days is None:
        print(f"{site_name}: nothing is known to be deleted there", file=sys.stderr)
        return 0
    found = find_endangered(folder, after_days, margin_days)
    code = 1 if found else 0
    if as_json:
        print(
            json.dumps([{"folder": str(path), **asdict(entry)} for path, entry in found], indent=2)
        )
        return code
    for path, entry in found[:_MOST_FOLDERS_LISTED]:
        print(
            f"{entry.days_left:5.1f} days left  {entry.num_files:6,} files  "
            f"{entry.size_bytes / 1e9:8.2f} GB  {path}"
        )
    if len(found) > _MOST_FOLDERS_LISTED:
        print(f"… and {len(found) - _MOST_FOLDERS_LISTED} more folders; --json lists all")
    if found:
        print(
            f"hint: {site_name} deletes what is unused for {after_days} days; "
            "`storage promote` keeps an artifact",
            file=sys.stderr,
        )
    else:
        print(f"{folder}: nothing that {site_name} deletes in {margin_days} days", file=sys.stderr)
    return code
