"""Build a recipe into an OCI image, without a network.

Everything that could make two builds differ is fixed: the context holds only hashed files, all
times are SOURCE_DATE_EPOCH, wheels come by hash, and the builder adds no label of its own.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.files import atomic_directory, write_json
from post_training.core.hashing import sha256_file
from post_training.images import builder
from post_training.images.base import (
    NATIVE_ROOT,
    Base,
    ensure_base,
    ensure_native_root,
    ensure_wheels,
)
from post_training.images.identity import image_tag
from post_training.images.lock import loose_requirements, unlocked_requirements
from post_training.images.namespaces import HOST_CPUS, can_emulate
from post_training.images.own_base import ensure_in_builder
from post_training.images.recipe import (
    BASE_LOCK,
    SOURCE_DATE_EPOCH,
    SYSTEM_LOCK,
    SYSTEM_PACKAGES,
    Recipe,
)
from post_training.images.registry import ensure_system_packages, read_system_lock
from post_training.images.store import ImageStore

_INPUT_HASH_LABEL = "org.post-training.input-hash"


@dataclass(frozen=True)
class BuiltImage:
    """An image of ours in the builder's storage.

    oci_digest: `sha256:<hex>` of the OCI config, which holds `labels` and `environment`.
    identity: as of `image_identity`.
    """

    tag: str
    oci_digest: str
    identity: dict[str, Any]
    labels: dict[str, str]
    environment: dict[str, str]


def image_identity(recipe: Recipe, base: Base) -> dict[str, Any]:
    """The content of /etc/post-training/image.json. No time, path or commit: equal inputs must give
    an equal image."""
    over = {"over": base.ours["name"]} if base.ours else {}
    return {
        **over,
        "name": recipe.name,
        "version": recipe.version,
        "input_hash": recipe.input_hash(base.sha256),
        "base": "locked" if base.is_locked else "unlocked",
        "base_sha256": base.sha256,
        "lock_sha256": {name: sha256_file(path) for name, path in recipe.locks.items()},
        "platform": recipe.settings.platform,
    }


def build_image(recipe: Recipe, store: ImageStore) -> tuple[BuiltImage, bool]:
    """Build the recipe, unless the builder has an image of this input hash; (image, is it new)."""
    with store.lock():
        refuse_unlocked(recipe)
        _refuse_foreign(recipe)
        base = ensure_base(recipe, store)
        identity = image_identity(recipe, base)
        if built := find_built(identity):
            return built, False
        native = ensure_native_root(recipe, base, store)
        folders = _download(recipe, base, store)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=store.folder) as temporary:
            context = Path(temporary) / "context"
            stage_context(recipe, base, identity, context, native)
            options = []
            if recipe.settings.is_emulated:
                (nothing := Path(temporary) / "nothing").mkdir()
                options = [f"--volume={nothing}:{HOST_CPUS}:ro"]
            start = base.reference
            if base.ours:
                start = ensure_in_builder(base.ours, recipe.folder / BASE_LOCK)
            _build(context, folders, identity, start, options)
    built = find_built(identity)
    if built is None:
        raise PostTrainingError("the builder finished, but the image is not in its storage")
    return built, True


def write_context(recipe: Recipe, store: ImageStore, folder: Path) -> None:
    """Write everything that a build reads into one new folder, for another builder to use.

    Errors: UsageError for a recipe over one of our images.
    """
    with store.lock(), atomic_directory(folder) as temporary:
        refuse_unlocked(recipe)
        base = ensure_base(recipe, store)
        if base.ours:
            raise UsageError(
                "its base is one of our images, which the context can't hold",
                where=str(recipe.folder),
            )
        native = ensure_native_root(recipe, base, store)
        stage_context(recipe, base, image_identity(recipe, base), temporary, native)
        for name, source in _download(recipe, base, store).items():
            shutil.copytree(source, temporary / name)


def _download(recipe: Recipe, base: Base, store: ImageStore) -> dict[str, Path]:
    """{name under which the Dockerfile mounts it: folder} with what the locks name."""
    folders = {"wheels": ensure_wheels(recipe, store)}
    if base.reference and (recipe.folder / SYSTEM_PACKAGES).exists():
        files = read_system_lock(recipe.folder, base.reference)
        folders["system"] = ensure_system_packages(files, recipe.locks[SYSTEM_LOCK], store.folder)
    return folders


def stage_context(
    recipe: Recipe,
    base: Base,
    identity: dict[str, Any],
    context: Path,
    native: Path | None = None,
) -> None:
    """Fill the build context.

    native: as of `ensure_native_root`.
    Errors: PostTrainingError when a source is edited meanwhile.
    """
    context.mkdir(exist_ok=True)
    if recipe.stage(context, base.sha256) != identity["input_hash"]:
        raise PostTrainingError("the sources changed while the build started; run it again")
    write_json(context / "image.json", identity)
    if base.file:
        os.link(base.file, context / "base.tar")
    if native:
        os.link(native, context / NATIVE_ROOT)


def find_built(identity: dict[str, Any]) -> BuiltImage | None:
    """The image with this identity in the builder's storage, or None."""
    tag = image_tag(identity)
    stored = builder.stored_image(tag)
    if stored is None or stored.labels.get(_INPUT_HASH_LABEL) != identity["input_hash"]:
        return None
    return BuiltImage(tag, stored.oci_digest, identity, stored.labels, stored.environment)


def refuse_unlocked(recipe: Recipe) -> None:
    """Errors: ConfigError for every requirement that more than one version or file could meet."""
    asked = [path for path in recipe.folder.glob("*.in") if path.name != SYSTEM_PACKAGES]
    faults = [fault for path in sorted(asked) for fault in loose_requirements(path)]
    for path in recipe.package_locks.values():
        faults += unlocked_requirements(path)
    if faults:
        raise ConfigError(faults, hint=f"`post-training image lock {recipe.name}` locks it")


def _refuse_foreign(recipe: Recipe) -> None:
    """Errors: UsageError where this machine can't run the image's programs, as a build has to."""
    settings = recipe.settings
    if settings.is_emulated and not can_emulate(settings.architecture):
        raise UsageError(
            f"this machine runs no programs for {settings.platform}",
            where=str(recipe.folder),
            hint="for arm64, installation/laptop/emulate-arm64 registers qemu, as root",
        )


def _build(
    context: Path,
    folders: dict[str, Path],
    identity: dict[str, Any],
    base: str | None,
    options: list[str],
) -> None:
    """Call the builder. folders: as of `_download`. base: the image that it starts from, if any.

    options: further ones, which leave no trace in the image.
    """
    # The Dockerfile makes labels of these, and declares them after all that can be cached.
    arguments = {
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "NAME": identity["name"],
        "VERSION": identity["version"],
        "INPUT_HASH": identity["input_hash"],
        "BASE_SHA256": identity["base_sha256"],
        "LOCK_SHA256": " ".join(f"{k}={v}" for k, v in identity["lock_sha256"].items()),
    }
    if base:
        arguments["BASE"] = base
    builder.build(
        [
            "--network=none", "--format=oci", "--layers=true",
            "--identity-label=false", f"--timestamp={SOURCE_DATE_EPOCH}",
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(f"--build-context={name}={folder}" for name, folder in folders.items()),
            f"--platform={identity['platform']}",
            f"--tag={image_tag(identity)}", *options, context,
        ]
    )  # fmt: skip
