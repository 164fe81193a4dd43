"""`post-training doctor`, `site …` and `storage …`: what a machine has."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_training.cli.options import GROUP, Artifact, Json, Repository, SiteName, Store

if TYPE_CHECKING:
    from post_training.images.doctor import Finding
    from post_training.slurm.upkeep import Touched

_MOST_FOLDERS_LISTED = 20

site_app = typer.Typer(help="Sites: the project's, and your own.", **GROUP)
storage_app = typer.Typer(help="Folders of a site: scratch, and permanent storage.", **GROUP)


def examine_machine(
    site: Annotated[str, typer.Option(help="laptop, clariden, lumi, …")] = "laptop",
    store: Store = None,
    ssh: Annotated[
        bool, typer.Option("--ssh", help="Only whether SSH reaches GitHub from here, and how.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what of this machine is not ready for a site's jobs; exit 1 if anything is wrong."""
    from post_training.images.store import open_store
    from post_training.slurm.doctor import examine_host, examine_ssh

    if ssh:
        sys.exit(_print_findings(examine_ssh(), as_json=as_json))
    sys.exit(_print_findings(examine_host(site, open_store(store)), as_json=as_json))


@site_app.command("new")
def site_new(
    name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens.")],
    like: Annotated[
        str, typer.Option(help="The site or example to copy: clariden, leonardo, …")
    ] = "laptop",
    repository: Repository = Path("."),
) -> None:
    """Make a site of your own in ~/.config/post-training/sites, as a copy of another."""
    from post_training.slurm.own_sites import OWN_FILE, new_site

    folder = new_site(name, like, repository.resolve())
    print(
        f"edit {OWN_FILE} (scheduler, storage) and edf.toml (mounts, network); then "
        f"`post-training site check {name}`",
        file=sys.stderr,
    )
    print(folder)


@site_app.command("check")
def site_check(
    name: Annotated[str, typer.Argument(help="A site of the project's or of your own.")],
    repository: Repository = Path("."),
    as_json: Json = False,
) -> None:
    """Say what is wrong with the two files of a site; exit 1 if anything is."""
    import os

    from post_training.slurm.own_sites import check_site_files

    env = {**os.environ, "PWD": str(Path.cwd())}
    findings = check_site_files(name, repository.resolve(), env)
    sys.exit(_print_findings(findings, as_json=as_json))


@site_app.command("list")
def site_list(repository: Repository = Path("."), as_json: Json = False) -> None:
    """The sites that --site takes, and the examples that `site new --like` takes."""
    from post_training.cli import tables
    from post_training.slurm.own_sites import known_sites

    sites = known_sites(repository.resolve())
    if as_json:
        print(json.dumps([{**asdict(site), "path": str(site.path)} for site in sites], indent=2))
        return
    print(tables.table(["site", "of", "file"], [[s.name, s.origin, str(s.path)] for s in sites]))


@storage_app.command("setup")
def storage_setup(
    site: SiteName,
    group: Annotated[
        str | None, typer.Option(help="The group that shares it; by default the folder's.")
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(help="The one folder that all of the group share, by default the site's."),
    ] = None,
    readers: Annotated[
        str | None, typer.Option(help="A second group, which may read what is shared and stored.")
    ] = None,
) -> None:
    """Make artifacts/{private,shared,store}: folders of the site, and links to them."""
    from post_training.slurm import storage
    from post_training.slurm.site import load_site

    links = storage.setup(site, load_site(site, {}), group, shared, readers)
    for link, folder in links.items():
        print(f"{link} -> {folder}")


@storage_app.command("promote")
def storage_promote(
    folder: Artifact,
    name: Annotated[str | None, typer.Option(help="Of the copy.", show_default=False)] = None,
) -> None:
    """Copy an artifact to artifacts/store, every file compared."""
    from post_training.records.promote import promote

    print(promote(folder, name))


@storage_app.command("promote-image")
def storage_promote_image(
    reference: Annotated[str, typer.Argument(metavar="IMAGE", help="Its name or a digest.")],
    site: SiteName,
    store: Store = None,
) -> None:
    """Copy an image to the site's permanent storage, where `reproduce --site` finds it."""
    from post_training.images.store import ImageStore, open_store
    from post_training.slurm import storage
    from post_training.slurm.site import load_site

    own = open_store(store)
    record = own.find(reference)
    kept = ImageStore(storage.permanent_images(site, load_site(site, {})))
    kept.copy_from(own, record)
    print(kept.image_path(record["sqsh_sha256"]))


@storage_app.command("repair")
def storage_repair(
    folder: Annotated[Path, typer.Argument(help="All below it, links left out.")],
    group: Annotated[
        str | None, typer.Option(help="Give it to this group; by default files keep theirs.")
    ] = None,
    readers: Annotated[str | None, typer.Option(help="A second group, which may read.")] = None,
) -> None:
    """Let the group read and write a folder again, and all that is made in it later."""
    from post_training.slurm.upkeep import repair

    _print_touched("given to the group", repair(folder, group, readers))


@storage_app.command("touch")
def storage_touch(folder: Annotated[Path, typer.Argument(help="On scratch.")]) -> None:
    """Count every file as used now, for a site that deletes what is unused. Ask whether it may."""
    from post_training.slurm.upkeep import touch

    _print_touched("counted as used now", touch(folder))


@storage_app.command("clean")
def storage_clean(
    folder: Annotated[Path, typer.Argument(help="With run folders below it.")],
    hours: Annotated[
        float, typer.Option(min=0, help="Leave what was written within these hours.")
    ] = 24,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
    as_json: Json = False,
) -> None:
    """List caches of runs and what killed processes left half-written; --yes removes them."""
    from post_training.slurm.upkeep import find_removable, remove

    found = find_removable(folder, hours)
    if as_json:
        print(json.dumps([{**asdict(each), "path": str(each.path)} for each in found], indent=2))
    else:
        for each in found:
            print(f"{each.size_bytes / 1e9:8.2f} GB  {each.kind}: {each.path}")
    total = f"{sum(each.size_bytes for each in found) / 1e9:.2f} GB in {len(found)} places"
    if yes:
        remove(found)
        print(f"removed {total}", file=sys.stderr)
    else:
        print(f"{total}; nothing was removed: --yes does it", file=sys.stderr)


def _print_touched(what: str, done: "Touched") -> None:
    """Exit code 1 where somebody else's files are left as they are."""
    print(f"{done.num_paths:,} paths {what}", file=sys.stderr)
    for owner, number in done.of_others.most_common():
        print(f"error: {number:,} paths are {owner}'s, who alone can change them", file=sys.stderr)
    sys.exit(1 if done.of_others else 0)


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
        if as_json:
            print("[]")
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


def _print_findings(findings: "Iterable[Finding]", *, as_json: bool) -> int:
    """The exit code, 1 when something is wrong."""
    from post_training.images.doctor import describe_findings

    found = list(findings)
    code, text = describe_findings(found)
    print(json.dumps([asdict(each) for each in found], indent=2) if as_json else text)
    return code
