"""One of our images as the base of a recipe: base.lock pins it by its OCI digest.

    recipe.toml    base = "cpu"
    base.lock      which image of that name: its digest, and the registries that have it

So an image gets further packages, and everything below them keeps its bytes. A build takes the base
from the builder's storage, or from a registry that base.lock names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json, write_json
from post_training.images import builder
from post_training.images.identity import image_tag
from post_training.images.recipe import BASE_LOCK, OWN_BASE_SCHEMA, Recipe
from post_training.images.reference import known_references
from post_training.images.skopeo import pull_to_builder
from post_training.images.store import ImageStore

# Of the image's record. `base`: whether its own base is as locked.
_LOCKED = ("name", "version", "platform", "input_hash", "oci_digest", "base")


def lock_own_base(recipe: Recipe, wanted: str, store: ImageStore) -> None:
    """Pin an image in the store as the recipe's base.

    wanted: the image, as of `ImageStore.find`; by its name the last pushed is meant.
    Errors: UsageError for one of another name or platform, and for one over a site's SIF.
    """
    record = store.find(wanted)
    _refuse_other(record, recipe, record["oci_digest"])
    if "base_sif" in record:
        raise UsageError(
            "an image over a site's SIF can't be a base: no builder starts from it",
            where=record["oci_digest"],
        )
    lock = {key: record[key] for key in _LOCKED}
    lock["registries"] = record.get("registries", {})
    write_json(recipe.folder / BASE_LOCK, {"schema": OWN_BASE_SCHEMA, **lock})


def read_own_base(recipe: Recipe) -> dict[str, Any]:
    """What base.lock says of the base. Errors: UsageError when there is no lock of that image."""
    path = recipe.folder / BASE_LOCK
    hint = f"`post-training image lock {recipe.name}` pins the {recipe.settings.base} image that "
    hint += "was pushed last"
    try:
        lock = read_json(path, OWN_BASE_SCHEMA)
    except FileNotFoundError:
        raise UsageError("the base is not locked", where=str(path), hint=hint) from None
    if missing := [key for key in (*_LOCKED, "registries") if key not in lock]:
        raise UsageError(f"lacks {', '.join(missing)}", where=str(path), hint=hint)
    _refuse_other(lock, recipe, str(path), hint)
    return lock


def _refuse_other(
    image: Mapping[str, Any], recipe: Recipe, where: str, hint: str | None = None
) -> None:
    """Errors: UsageError for an image of another name or platform than the recipe asks for."""
    for key, asked in (("name", recipe.settings.base), ("platform", recipe.settings.platform)):
        if image[key] != asked:
            raise UsageError(
                f"its {key} is {image[key]}, recipe.toml asks for {asked}", where=where, hint=hint
            )


def ensure_in_builder(lock: Mapping[str, Any], where: Path) -> str:
    """The tag of the base in the builder's storage, pulled from a registry where it is missing.

    It is the tag that the base's own build gives: an image names the tag that it was built from,
    so another tag would give it another digest. where: base.lock, for the error.
    Errors: UsageError when neither the builder nor a registry has the base.
    """
    tag, wanted = image_tag(lock), lock["oci_digest"]
    if builder.stored_tags().get(tag) == wanted:
        return tag
    problems = []
    for reference in known_references(lock):
        try:
            pull_to_builder(reference, tag)
        except PostTrainingError as error:
            problems.append(f"{reference}: {error.problem}")
            continue
        if builder.stored_tags().get(tag) == wanted:
            return tag
        builder.remove(tag)
        problems.append(f"{reference}: it is another image")
    raise UsageError(
        "\n  ".join([f"the builder does not have {lock['name']} {lock['version']} ({wanted})",
                     *(problems or ["and base.lock names no registry that does"])]),
        where=str(where),
        hint=f"`post-training image rebuild {wanted[7:19]} --cached` makes it again there; "
        f"`image lock {where.parent.name}` pins the {lock['name']} image that was pushed last",
    )  # fmt: skip
