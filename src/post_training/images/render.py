"""Render an EDF: from a site's EDF and an image's record to one flat EDF that pins the image.

    edf/laptop.toml  +  store/sha256-….json   ->   edf/post-training.toml

The rendered file needs no other: no base_environment, the image by path and digests. It mounts the
store read-only, so that the digest can be checked from inside.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import user_config, write_atomic
from post_training.core.secrets import FoundCredentials
from post_training.images.checkout import not_a_checkout
from post_training.images.edf import merge_edf
from post_training.images.identity import PIN
from post_training.images.layer import layer_mounts
from post_training.images.reference import is_reference
from post_training.images.store import ImageStore

NO_CREDENTIALS = FoundCredentials()
_RENDERED = "post-training"
# Below the user's folder of settings: a folder a site, with both files of it.
OWN_SITES = "sites"
OWN_EDF = "edf.toml"


def image_environment(
    record: Mapping[str, Any], image: Path | str, record_path: Path | None = None
) -> dict[str, str]:
    """The variables that pin an image: by them a process knows, and checks, which one it is in.

    image: what runs, a squashfs, a SIF or REGISTRY/NAME@sha256:…. record_path: where the record of
    an image in a registry is; a file has it beside it.
    """
    pins = {
        f"{PIN}PATH": str(image),
        f"{PIN}OCI_DIGEST": record["oci_digest"],
        f"{PIN}SQSH_SHA256": record["sqsh_sha256"],
        f"{PIN}INPUT_HASH": record["input_hash"],
    }
    if record_path is not None and is_reference(str(image)):
        pins[f"{PIN}RECORD"] = str(record_path)
    if str(image).endswith(".sif"):
        pins[f"{PIN}SIF_SHA256"] = record["sif_sha256"]
    if "base_sif" in record:
        # The SIF's own variables know nothing of what lies over it.
        return {**record["environment"], **pins}
    return pins


def render_edf(
    site_file: Path,
    record: Mapping[str, Any],
    store: ImageStore,
    image: Path | str | None = None,
    credentials: FoundCredentials = NO_CREDENTIALS,
) -> str:
    """The rendered EDF's text. Variables in the site's file stay: they are expanded where it runs.

    record: the image's. image: what runs; the squashfs unless given. credentials: token
    files to mount.
    """
    site = merge_edf(site_file, os.environ, Path.cwd())
    if image is None and "base_sif" in record:
        raise UsageError(
            f"{record['name']} {record['version']} lies over a site's SIF, and needs Singularity",
            where=str(site_file),
            hint="its site has `launcher: {kind: singularity}`; --as edf or submit there",
        )
    image = image or store.image_path(record["sqsh_sha256"])
    environment = {
        **dict(credentials.variables),
        **site.get("env", {}),
        **image_environment(record, image, store.record_path(record["sqsh_sha256"])),
    }
    keys: dict[str, Any] = {
        "image": str(image),
        "workdir": site.get("workdir"),
        "entrypoint": site.get("entrypoint", False),
        "writable": site.get("writable", True),
        "mounts": [
            *site.get("mounts", []),
            f"{store.folder}:{store.folder}:ro",
            *layer_mounts(record, store),
            *credentials.mounts,
        ],
        "devices": site.get("devices"),
    }
    name, file = site_file.stem, "the site's file in edf/"
    if site_file.name == OWN_EDF:
        name, file = site_file.parent.name, str(site_file)
    header = (
        f"# {record['name']} {record['version']} for the site {name!r}.\n"
        f"# Rendered: edit {file} and push the image again instead.\n"
    )
    return header + edf_text(keys, {"env": environment, "annotations": site.get("annotations", {})})


def edf_text(keys: Mapping[str, Any], tables: Mapping[str, Mapping[str, str]]) -> str:
    """An EDF's keys and tables as TOML. Keys that are None and empty tables are left out."""
    lines = [f"{key} = {_toml(value)}" for key, value in keys.items() if value is not None]
    for table, values in tables.items():
        if values:
            lines += ["", f"[{table}]", *(f"{_key(k)} = {_toml(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def rendered_name(record: Mapping[str, Any]) -> str:
    """The file name of an image's EDF: post-training.toml, or post-training-NAME.toml for an image
    over another one of ours, since its base stays in use."""
    return f"{_RENDERED}-{record['name']}.toml" if record.get("over") else f"{_RENDERED}.toml"


def site_files(repository: Path) -> list[Path]:
    """The EDFs of the project's sites, without those that were rendered beside them."""
    files = sorted((repository / "edf").glob("*.toml"))
    return [path for path in files if not re.fullmatch(rf"{_RENDERED}(-.*)?", path.stem)]


def install_edf(text: str, name: str, repository: Path, edf_folder: Path) -> Path:
    """Write edf/NAME and link to it from the user's EDF folder; its path.

    name: as of `rendered_name`.
    Errors: PostTrainingError when a file of that name, and no link, is in the user's folder.
    """
    rendered = repository / "edf" / name
    write_atomic(rendered, text)
    link = edf_folder / name
    if link.exists() and not link.is_symlink():
        raise PostTrainingError(
            "a file of this name is in the way of the link to the rendered EDF",
            where=str(link),
            hint="move it away and push again",
        )
    if not link.is_symlink() or os.readlink(link) != str(rendered):
        edf_folder.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{name}.{os.getpid()}")
        temporary.symlink_to(rendered)
        temporary.replace(link)
    return rendered


def own_site_folder(site: str) -> Path:
    """Where the files of a site of the user's own are, if there is one of this name."""
    return user_config() / OWN_SITES / site


def site_file(site: str, repository: Path) -> Path:
    """The path of a site's EDF, the project's or the user's own.

    Errors: UsageError for an unknown site.
    """
    path = repository / "edf" / f"{site}.toml"
    own = own_site_folder(site) / OWN_EDF
    if own.is_file() and not path.is_file():
        return own
    if not path.is_file():
        known = [file.stem for file in site_files(repository)]
        if not known:
            raise not_a_checkout(repository)
        known += sorted(file.parent.name for file in own.parent.parent.glob(f"*/{OWN_EDF}"))
        raise UsageError(
            f"no site {site!r}", where=str(path.parent), hint=f"there are: {', '.join(known)}"
        )
    return path


def _toml(value: Any) -> str:
    # JSON's strings, booleans and lists of strings are TOML's too.
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)
