"""`post-training image …` and `edf …`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from post_training.cli.options import GROUP, Json, Repository, Store

image_app = typer.Typer(help="Build images and keep the image store.", **GROUP)
edf_app = typer.Typer(help="Render, check and run EDF files.", **GROUP)

Reference = Annotated[
    str,
    typer.Argument(help="OCI digest, sha256 of the squashfs or SIF (8 digits are enough) or NAME."),
]


@image_app.command("build")
def image_build(
    name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
    store: Store = None,
    repository: Repository = Path("."),
    force: Annotated[bool, typer.Option(help="Build even if the store has it.")] = False,
) -> None:
    """Build containers/NAME into an OCI image, unless its input hash is built already."""
    from post_training.cli import image_commands

    image_commands.build(name, store, repository, force=force)


@image_app.command("push-sqsh")
def image_push_sqsh(
    name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
    site: Annotated[str, typer.Option(help="The site file of edf/ to render from.")] = "laptop",
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Put the built image into the store as a squashfs, and render its EDF into edf/."""
    from post_training.cli import image_commands

    image_commands.push(name, site, store, repository)


def _install_edf(image: str, site: str, store: Path | None, repository: Path) -> None:
    from post_training.slurm import environment

    path = environment.install(image, site, store, repository)
    print(f"EDF: {path}", file=sys.stderr)


@image_app.command("push-sif")
def image_push_sif(
    name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
    site: Annotated[
        str | None,
        typer.Option(help="Render its EDF into edf/, for this site.", show_default=False),
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Put the built image into the store as a SIF: the same squashfs, for Singularity."""
    from post_training.cli import image_commands

    image_commands.push_sif(name, store, repository)
    if site is not None:
        _install_edf(name, site, store, repository)


@image_app.command("compile")
def image_compile(
    package: Annotated[
        str, typer.Argument(help="A folder of containers/ with a program `compile`: flash-attn.")
    ],
    image: Annotated[str, typer.Option(help="The image that gets it: a folder of containers/.")] = (
        "gh200"
    ),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Files that are compiled at once; else one for each processor and 8 GB of memory.",
            show_default=False,
        ),
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Compile a package in the built image, for the next `image build`: flash-attn, on a node."""
    from post_training.cli import image_commands

    image_commands.compile_package(package, image, jobs, store, repository)


@image_app.command("push")
def image_push(
    reference: Reference,
    name: Annotated[
        str, typer.Argument(help="Where to: REGISTRY/NAME, without a tag.", metavar="REGISTRY/NAME")
    ],
    store: Store = None,
) -> None:
    """Copy an image and its record to a registry; prints where it is now, by digest."""
    from post_training.cli import image_commands

    image_commands.push_to_registry(reference, name, store)


@image_app.command("pull")
def image_pull(
    reference: Annotated[
        str,
        typer.Argument(
            help="REGISTRY/NAME@sha256:…, as `image push` printed it.", metavar="REFERENCE"
        ),
    ],
    site: Annotated[
        str | None,
        typer.Option(help="Render its EDF into edf/, for this site.", show_default=False),
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Get an image from a registry by its digest into the store; other content is refused."""
    from post_training.cli import image_commands

    record = image_commands.pull_from_registry(reference, store)
    if site is not None:
        _install_edf(record["oci_digest"], site, store, repository)


@image_app.command("push-layer")
def image_push_layer(
    name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "rocm",
    site: Annotated[
        str, typer.Option(help="Whose Singularity runs the SIF; its EDF is rendered.")
    ] = "lumi",
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Make an image over a site's own SIF: our packages as a squashfs, without a builder."""
    from post_training.cli import image_commands
    from post_training.slurm import environment

    singularity = environment.singularity_program(site)
    image_commands.push_layer(name, singularity, store, repository)
    _install_edf(name, site, store, repository)


@image_app.command("lock")
def image_lock(
    name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
    base: Annotated[
        str | None,
        typer.Option(
            help="Where to read a registry's base instead: docker://MIRROR/NAME:TAG or "
            "oci:FOLDER:TAG; or FILE.sif, a site's own SIF, to be the base; or, over one of our "
            "images, which: its digest, instead of the one pushed last.",
            show_default=False,
        ),
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Resolve what containers/NAME asks for into locks; exit 1 where something stays open."""
    from post_training.cli import image_commands

    sys.exit(image_commands.lock(name, base, store, repository))


@image_app.command("lock-tools")
def image_lock_tools(repository: Repository = Path(".")) -> None:
    """Resolve what pyproject.toml asks for into requirements-dev.lock, for `make setup`."""
    from post_training.images.lock import lock_tools

    print(lock_tools(repository.resolve()))


@image_app.command("context")
def image_context(
    name: Annotated[str, typer.Argument(help="A folder of containers/.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Put all that a build reads into one folder, for builders other than ours."""
    from post_training.cli import image_commands

    image_commands.context(name, folder, store, repository)


@image_app.command("list")
def image_list(store: Store = None, as_json: Json = False) -> None:
    """The images in the store, the last pushed first."""
    from post_training.cli import image_commands

    image_commands.show_list(store, as_json=as_json)


@image_app.command("show")
def image_show(reference: Reference, store: Store = None) -> None:
    """The whole record of an image, as JSON."""
    from post_training.cli import image_commands

    print(json.dumps(image_commands.open_store(store).find(reference), indent=2))


@image_app.command("verify")
def image_verify(reference: Reference, store: Store = None, as_json: Json = False) -> None:
    """Hash an image again: ok, missing or corrupt."""
    from post_training.cli import image_commands

    sys.exit(image_commands.verify(reference, store, as_json=as_json))


@image_app.command("passport")
def image_passport(reference: Reference, store: Store = None, as_json: Json = False) -> None:
    """Compare all forms of an image (OCI, squashfs, SIF, registry): exit 0 one image, 4 differs."""
    from post_training.cli import image_commands

    sys.exit(image_commands.passport(reference, store, as_json=as_json))


@image_app.command("rebuild")
def image_rebuild(
    reference: Reference,
    store: Store = None,
    repository: Repository = Path("."),
    cached: Annotated[
        bool, typer.Option("--cached", help="Take the layers that buildah has.")
    ] = False,
) -> None:
    """Build an image again from its commit: exit 0 identical, 4 differs (which paths)."""
    from post_training.cli import image_commands

    sys.exit(image_commands.rebuild(reference, store, repository, cached=cached))


@image_app.command("release")
def image_release(
    reference: Reference,
    tests: Annotated[
        list[str] | None,
        typer.Argument(help="Instead of its whole tests: arguments of pytest.", metavar="TESTS"),
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Test an image with the tests of its commit, then write containers/images.lock."""
    from post_training.cli import image_commands

    image_commands.release(reference, tests or [], store, repository)


@image_app.command("gc")
def image_gc(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders with runs, remembered.", show_default=False),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them.")] = False,
    forget: Annotated[
        Path | None, typer.Option(help="A folder of runs that is gone.", show_default=False)
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
    as_json: Json = False,
) -> None:
    """Which images no run names, no EDF pins and no release has; --delete removes them."""
    from post_training.cli import image_commands

    image_commands.gc(runs or [], forget, store, repository, delete=delete, as_json=as_json)


@edf_app.command("render")
def edf_render(
    image: Annotated[str, typer.Option(help="Digest or name of an image in the store.")] = "cpu",
    site: Annotated[str, typer.Option(help="A site file of edf/.")] = "laptop",
    form: Annotated[
        str | None,
        typer.Option("--as", help="edf or singularity; else the site's own.", metavar="FORM"),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKOUT",
            help="To develop in: writable, with the code of this checkout.",
            show_default=False,
        ),
    ] = None,
    ssh_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pub",
            help="With --dev: who may log in to the container by SSH.",
            show_default=False,
        ),
    ] = None,
    store: Store = None,
    repository: Repository = Path("."),
) -> None:
    """Print an image's EDF for a site, or the script that runs Singularity there."""
    from post_training.core.errors import UsageError
    from post_training.slurm import environment

    if dev is not None:
        if form not in (None, "edf"):
            raise UsageError(f"--dev: makes an EDF (got --as {form})")
        print(
            environment.render_for_development(image, site, store, repository, dev, ssh_key), end=""
        )
        return
    if ssh_key is not None:
        raise UsageError("--ssh-key: only with --dev")
    print(environment.render(image, site, form, store, repository), end="")


@edf_app.command("check")
def edf_check(
    environment: Annotated[str, typer.Argument(help="NAME, NAME.toml or a path, as for srun.")],
    dialect: Annotated[
        str | None,
        typer.Option(
            help="The engine that will read it: ce (srun --environment) or sarus (srun --edf).",
            show_default=False,
        ),
    ] = None,
    repository: Repository = Path("."),
    as_json: Json = False,
) -> None:
    """Tell every fault of an EDF at once, without running it; exit 2 where there is one."""
    from post_training.cli import image_commands

    sys.exit(image_commands.check(environment, dialect, repository, as_json=as_json))


# These two only describe what cli/edf.py reads: it starts without typer.
@edf_app.command("run")
def edf_run(
    environment: Annotated[str, typer.Argument(help="NAME, NAME.toml or a path, as for srun.")],
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="After --: what to run.")
    ],
    mount: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC:DST[:FLAGS]", help="One more mount; may be repeated."),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(metavar="CHECKOUT", help="Use the sources of this checkout, not the image's."),
    ] = None,
) -> None:
    """Run a command in an EDF's image: `edf run NAME -- COMMAND …`."""


@edf_app.command("resolve")
def edf_resolve(
    environment: Annotated[str, typer.Argument(help="NAME, NAME.toml or a path, as for srun.")],
) -> None:
    """Check an EDF and print its path: `edf resolve NAME`."""
