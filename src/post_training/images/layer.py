"""An image over a site's own SIF: the SIF stays where it is, and ours is one squashfs over it.

For a site whose users have no registry, no root and no builder, but a SIF with torch on its file
system (LUMI). Two files make the image, and nothing is built as root:

    the SIF      pinned by its sha256 in base.lock; a link in the store leads to it
    the layer    /opt/post-training (packages, sources) and /etc/post-training, as a squashfs

    singularity exec -B LAYER:/opt/post-training:image-src=/opt/post-training … SIF COMMAND

The image's identity is the pair of digests: its `oci_digest` is the sha256 over both. Equal inputs
give an equal layer. The recipe's layer.sh makes it, inside the SIF, with the recipe's own locks.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import new_file_mode, sync
from post_training.core.hashing import sha256_file
from post_training.core.process import run_tool
from post_training.images.base import Base, ensure_wheels
from post_training.images.build import image_identity, refuse_unlocked, stage_context
from post_training.images.checkout import describe_checkout
from post_training.images.identity import LAYER_FOLDERS, image_digest, pair_digest
from post_training.images.push import COMPRESSION, SITE_PACKAGES, make_squashfs, python_packages
from post_training.images.recipe import BASE_LOCK, SOURCE_DATE_EPOCH, Recipe
from post_training.images.site_sif import locked_site_sif
from post_training.images.store import RECORD_SCHEMA, ImageStore

SCRIPT = "layer.sh"
# What the layer's programs need, whatever the SIF and the host say. Singularity and Apptainer put
# PREPEND_PATH before the PATH of the SIF.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PREPEND_PATH": "/opt/post-training/bin:/opt/post-training/venv/bin",
    "PYTHONNOUSERSITE": "1",
    "VIRTUAL_ENV": "/opt/post-training/venv",
}


def push_layer(recipe: Recipe, store: ImageStore, singularity: Sequence[str]) -> dict[str, Any]:
    """Make the layer, and put it and a link to the SIF into the store; the image's record.

    singularity: the program and its options, as of the site's launcher.
    Errors: UsageError where base.lock names no SIF; PostTrainingError where the SIF is another one
    than the lock's, or the layer's packages do not fit to it.
    """
    lock = locked_site_sif(recipe.folder)
    hint = f"`post-training image lock {recipe.name} --base FILE.sif` pins one"
    if lock is None:
        raise UsageError("names no SIF of a site", where=str(recipe.folder / BASE_LOCK), hint=hint)
    if SCRIPT not in recipe.files:
        raise UsageError(f"this recipe has no {SCRIPT}", where=str(recipe.folder))
    sif = Path(lock["file"])
    if (found := image_digest(sif).sha256) != lock["sha256"]:
        raise PostTrainingError(
            f"its sha256 is {found}, base.lock has {lock['sha256']}", where=str(sif), hint=hint
        )
    base = Base(lock["sha256"], None, {}, [])
    identity = {**image_identity(recipe, base), "over_sif": True}
    with store.lock():
        refuse_unlocked(recipe)
        if record := store.find_built(identity["input_hash"]):
            return record
        wheels = ensure_wheels(recipe, store)
        with tempfile.TemporaryDirectory(prefix=".push-", dir=store.folder) as temporary:
            work = Path(temporary)
            stage_context(recipe, base, identity, work / "context")
            root = _run_script(singularity, sif, work, wheels)
            squashfs = work / "layer.sqsh"
            make_squashfs(root, squashfs, all_root=True)
            squashfs.chmod(new_file_mode(store.folder))
            sync(squashfs)
            layer, size_bytes = sha256_file(squashfs), squashfs.stat().st_size
            python = python_packages(root.glob(SITE_PACKAGES))
            squashfs.replace(store.image_path(layer))
        _link(store.sif_path(lock["sha256"]), sif)
        return store.add(
            {
                "schema": RECORD_SCHEMA,
                **identity,
                "oci_digest": pair_digest(lock["sha256"], layer),
                "sqsh_sha256": layer,
                "size_bytes": size_bytes,
                "sif_sha256": lock["sha256"],
                "sif_size_bytes": lock["size_bytes"],
                "base_sif": str(sif),
                "checkout": describe_checkout(recipe.repository),
                "pushed": datetime.now(UTC).isoformat(timespec="seconds"),
                "compression": " ".join(COMPRESSION),
                "builder": _versions(singularity[0]),
                "environment": _ENVIRONMENT,
                "packages": {"python": python},
            }
        )


def layer_mounts(record: Mapping[str, Any], store: ImageStore) -> list[str]:
    """The mounts of an image's layer over its SIF, for Singularity; none for any other image."""
    if "base_sif" not in record:
        return []
    layer = store.image_path(record["sqsh_sha256"])
    return [f"{layer}:{folder}:image-src={folder}" for folder in LAYER_FOLDERS]


def refuse_layer(record: Mapping[str, Any], cannot: str) -> None:
    """Errors: UsageError for an image over a site's SIF, which is no whole image by itself."""
    if "base_sif" in record:
        raise UsageError(
            f"{record['name']} {record['version']} lies over a site's SIF, and {cannot}",
            where=record["base_sif"],
            hint="`post-training image verify` hashes both files of it",
        )


def _run_script(singularity: Sequence[str], sif: Path, work: Path, wheels: Path) -> Path:
    """Run the recipe's script in the SIF; the folder that holds what it made, as from `/`."""
    root = work / "root"
    (work / "tmp").mkdir()
    binds = {"/context": work / "context", "/wheels": wheels, "/tmp": work / "tmp"}
    for folder in LAYER_FOLDERS:
        binds[folder] = root / folder.lstrip("/")
        binds[folder].mkdir(parents=True)
    program, *options = singularity
    # The host's variables and home folder stay out: user packages are in it.
    run_tool(
        [program, "exec", *options, "--cleanenv", "--no-home", "--pwd=/",
         *(f"--bind={source}:{target}" for target, source in binds.items()),
         f"--env=SOURCE_DATE_EPOCH={SOURCE_DATE_EPOCH}", sif, "sh", f"/context/{SCRIPT}"],
        show=True,
    )  # fmt: skip
    return root


def _link(link: Path, sif: Path) -> None:
    """A link in the store that leads to the SIF; the site's file is neither copied nor owned."""
    if link.exists():
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(sif)
    temporary.replace(link)


def _versions(program: str) -> dict[str, str]:
    return {
        shutil.which(program) or program: run_tool([program, "--version"]),
        "mksquashfs": run_tool(["mksquashfs", "-version"]).splitlines()[0],
    }
