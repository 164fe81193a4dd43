"""What a job runs in: the EDF of an image and a site, rendered, checked, and frozen at submission,
so that no later edit reaches the job.

A site of Singularity's has no engine for EDFs: there the same settings become a script.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.files import write_json
from post_training.core.secrets import find_credentials
from post_training.images.checkout import describe_changes
from post_training.images.edf import Edf, edf_folders, find_edf, load_edf, merge_edf
from post_training.images.inside import FINDINGS
from post_training.images.reference import is_reference, registry_reference
from post_training.images.render import edf_text, install_edf, render_edf, rendered_name, site_file
from post_training.images.runner import PINNED_DIGEST, image_file
from post_training.images.store import ImageStore, open_store
from post_training.slurm.singularity import render_script, sif_of
from post_training.slurm.site import Launcher, load_site, site_names

FORMS = ("edf", "singularity")


def read_environment(
    name: str,
    env: Mapping[str, str],
    cwd: Path,
    *,
    sources_are_here: bool = True,
    in_registry: bool = False,
) -> Edf:
    """Find the EDF that `name` means, and check it; the sources of its mounts too if they are here.

    in_registry: whether the site's engine takes images from a registry alone.
    Errors: UsageError when it pins no image digest or its image is not there; ConfigError.
    """
    edf = load_edf(find_edf(name, env, cwd), env, cwd, sources_are_here=sources_are_here)
    if PINNED_DIGEST not in edf.env:
        raise UsageError(
            f"no image digest is pinned ({PINNED_DIGEST} is not in [env])",
            where=str(edf.path),
            hint="submit with an EDF that `make push-sqsh` rendered, or that is based on one",
        )
    if in_registry:
        if not is_reference(edf.image):
            raise UsageError(
                f"image: must be REGISTRY/NAME@sha256:… on this site (got {edf.image!r})",
                where=str(edf.path),
                hint="`post-training image push`, then `edf render --site` with this site",
            )
    elif not image_file(edf).exists():
        raise UsageError("no such image", where=edf.image, hint="push it again")
    return edf


def check_site(edf: Edf, site: str) -> None:
    """Errors: UsageError when the EDF was rendered for another site."""
    found = edf.env.get("POST_TRAINING_SITE", site)
    if found != site:
        raise UsageError(
            f"this EDF is of the site {found!r}, not of {site!r}",
            where=str(edf.path),
            hint=f"`post-training edf render --site {site}` makes one for the image, or give "
            f"--site {found}",
        )


def check_is_mounted(path: Path, what: str, edf: Edf) -> None:
    """Errors: UsageError when nothing below `path` could be written inside. what: for the error."""
    mounts = [mount for mount in edf.mounts if mount.source == mount.target]
    if any(path.is_relative_to(mount.source) and "ro" not in mount.flags for mount in mounts):
        return
    shown = ", ".join(str(mount) for mount in edf.mounts) or "nothing"
    raise UsageError(
        f"the {what} is not mounted inside the image ({edf.path.name} mounts {shown})",
        where=str(path),
        hint="choose one below those, or write an EDF with base_environment = "
        '"post-training" and one more mount',
    )


def frozen_edf(edf: Edf, mounts: Sequence[str]) -> str:
    """The EDF with its parents in it. Variables stay: the node has them, and expands them."""
    merged = merge_edf(edf.path, os.environ, Path.cwd())
    tables = {name: merged.pop(name, {}) for name in ("env", "annotations")}
    merged["mounts"] = [*merged.get("mounts", []), *mounts]
    header = f"# {edf.path} as it was at submission.\n"
    return header + edf_text(merged, tables)


def development_mounts(folder: Path) -> list[str]:
    """Where the image's entrypoint looks for a checkout's sources, and for what they are."""
    return [
        f"{folder / 'dev'}:{FINDINGS / 'dev'}:ro",
        f"{folder / 'dev.json'}:{FINDINGS / 'dev.json'}:ro",
    ]


def render(
    reference: str, site: str, form: str | None, store_folder: Path | None, repository: Path
) -> str:
    """`edf render`: the text of the EDF, or of the script that starts Singularity.

    reference: an image of the store. form: "edf" or "singularity"; None: the site's own.
    On a site of Singularity's the EDF names the SIF: `submit` reads it there. On one of Sarus' it
    names the image in a registry.
    """
    if form not in (None, *FORMS):
        raise UsageError(f"--as: must be one of {', '.join(FORMS)} (got {form!r})")
    path = site_file(site, repository.resolve())
    store = open_store(store_folder)
    record = store.find(reference)
    launcher = _launcher(site)
    credentials = find_credentials(os.environ)
    if (form or launcher.kind) == "singularity":
        return render_script(site, launcher, path, record, store, credentials)
    return render_edf(path, record, store, image_of(record, store, launcher), credentials)


def render_for_development(
    reference: str,
    site: str,
    store_folder: Path | None,
    repository: Path,
    checkout: Path,
    ssh_key: Path | None,
) -> str:
    """`edf render --dev`: an EDF to work in, from an editor or a notebook. The image is writable,
    the checkout is mounted where it is and runs in place of the image's own code.

    ssh_key: a public key, whose owner may log in to the container where the site has the SSH hook.
    It needs a file that says which commit the code is of: CHECKOUT/build/dev.json.
    Errors: UsageError.
    """
    checkout = checkout.resolve()
    if not (checkout / "src/post_training").is_dir():
        raise UsageError("--dev: not a checkout of this project", where=str(checkout))
    if not _launcher(site).takes_edf:
        raise UsageError(
            f"--dev: {site} starts Singularity, which reads no EDF",
            hint=f"singularity exec --bind {checkout} … IMAGE.sif: see docs/guides/"
            "remote-development.md",
        )
    build = checkout / "build"
    build.mkdir(exist_ok=True)
    commit = describe_changes(checkout)["commit"]
    # The code may change at any time: no record of a run in it may name a diff.
    write_json(build / "dev.json", {"commit": commit, "diff": None, "is_live": True})
    mounts = [
        f"{checkout}:{checkout}",
        f"{checkout}:{FINDINGS / 'dev'}:ro",
        f"{build / 'dev.json'}:{FINDINGS / 'dev.json'}:ro",
    ]
    hooks = {} if ssh_key is None else _ssh_hook(ssh_key)
    text = render(reference, site, "edf", store_folder, repository)
    merged = tomllib.loads(text)
    tables = {name: merged.pop(name, {}) for name in ("env", "annotations")}
    merged = {**merged, "writable": True, "mounts": [*merged.get("mounts", []), *mounts]}
    tables["annotations"] = {**tables["annotations"], **hooks}
    header = (
        f"# To develop in: writable, and with the code of {checkout}. Runs in it are not\n"
        "# reproducible by the image's digest, and their records say so.\n"
    )
    return header + edf_text(merged, tables)


def _ssh_hook(key: Path) -> dict[str, str]:
    """https://docs.cscs.ch/software/container-engine/resource-hook: the hook wants a writable
    container. Errors: UsageError for what is no public key."""
    try:
        text = key.expanduser().read_text()
    except (OSError, UnicodeDecodeError):
        raise UsageError("--ssh-key: no such file", where=str(key)) from None
    if "PRIVATE KEY" in text:
        raise UsageError(
            "--ssh-key: is a private key", where=str(key), hint="the public one ends in .pub"
        )
    if not text.startswith(("ssh-", "ecdsa-", "sk-")):
        raise UsageError("--ssh-key: is no public key of SSH", where=str(key))
    return {
        "com.hooks.ssh.enabled": "true",
        "com.hooks.ssh.authorize_ssh_key": str(key.expanduser().absolute()),
    }


def image_of(record: Mapping[str, Any], store: ImageStore, launcher: Launcher) -> str:
    """A stored image as the site's engine takes it: a squashfs, a SIF, or a registry's.

    Errors: UsageError when the image has no such form.
    """
    if launcher.kind == "sarus":
        return str(registry_reference(record))
    if launcher.kind == "singularity":
        return str(sif_of(record, store))
    return str(store.image_path(record["sqsh_sha256"]))


def singularity_program(site: str) -> list[str]:
    """The program of a site of Singularity's, and its options. Errors: UsageError for another."""
    launcher = load_site(site, {}).launcher
    if launcher.kind != "singularity":
        raise UsageError(
            f"the site {site!r} has no Singularity (its launcher is of kind {launcher.kind})",
            hint="a layer over a SIF is made where that SIF is: --site lumi, or one of your own",
        )
    return [launcher.command, *launcher.options]


def install(reference: str, site: str, store_folder: Path | None, repository: Path) -> Path:
    """Write the image's EDF for the site, linked into the user's EDF folder; its path."""
    repository = repository.resolve()
    text = render(reference, site, "edf", store_folder, repository)
    name = rendered_name(open_store(store_folder).find(reference))
    return install_edf(text, name, repository, edf_folders(os.environ)[0])


def _launcher(site: str) -> Launcher:
    # An EDF of the user's own beside the project's needs no file of a scheduler.
    if site not in site_names():
        return Launcher(kind="edf")
    return load_site(site, {}).launcher
