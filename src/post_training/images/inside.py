"""Inside an image: which image is this, who checked it, and may other code than its own run here?

    /etc/post-training/              what the image says of itself (images/identity.py)
    POST_TRAINING_IMAGE_*            what the EDF pins, or the command line of a SIF: only claims
    /run/post-training/image.json    what our runner found before it started this process
    the image store's record         commit and package lists, where the store is mounted

Other code runs where something is mounted over the image's files, or where a variable names code.
Such a run can't be reproduced from the image's digest alone, and its record names both.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import parse_mount_table
from post_training.images.edf import read_image_variables
from post_training.images.identity import (
    IMAGE_FILE,
    LAYER_FOLDERS,
    PIN,
    PINNED,
    check_identity,
    check_image_digest,
    pair_digest,
    read_image,
    read_record_at,
    read_record_beside,
    seal,
)
from post_training.images.reference import Reference, is_reference, parse_reference

# Where our runner leaves what it found and did, each as NAME.json.
FINDINGS = Path("/run/post-training")
ROOT = Path("/")
# Where the entrypoint takes the code from when a checkout is mounted.
DEVELOPMENT_SOURCES = FINDINGS / "dev/src"
# NAME/NAME, as models and datasets are called on the Hugging Face hub.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Folders of programs, libraries, packages and the settings that say where they are.
_CODE_FOLDERS = ("/opt/post-training", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
_CODE = tuple(Path(name) for name in _CODE_FOLDERS)
# Files of the host that every engine mounts; no code is in them.
_HARMLESS = {
    "/",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/etc/localtime",
    "/etc/timezone",
    "/etc/passwd",
    "/etc/group",
    "/etc/mtab",
}
# Where people mount data.
_DATA = tuple(Path(f"/{name}") for name in ("home", "mnt", "media", "proc", "root", "run", "srv",
                                            "sys", "dev", "tmp", "var/tmp"))  # fmt: skip
# Drivers and network libraries that a site's own engine mounts: they belong to the node.
_DRIVER = re.compile(
    r"/(usr/)?lib(32|64)?/(\w+-linux-gnu/)?([\w.-]+/)*"
    r"(lib(cuda|nv|EGL|GL|OpenCL|vdpau|cxi|fabric|nccl-net|nccl-tuner|rccl-net|gdrapi|xpmem|lnx"
    r"|munge|pmi|slurm|jansson|json-c)[\w.+-]*\.so[\w.]*|firmware/nvidia/.*)"
    r"|/usr/bin/nvidia[\w-]*|/usr/share/(nvidia|glvnd|egl|vulkan)/.*|/etc/(nvidia|vulkan|OpenCL)/.*"
)
# Each names code, or a place where code is looked for before the image's own.
_VARIABLES = (
    "LD_PRELOAD",
    "LD_AUDIT",
    "LD_LIBRARY_PATH",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "BASH_ENV",
    "ENV",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PYTHONUSERBASE",
    "PYTHONEXECUTABLE",
    "PYTHONPLATLIBDIR",
    "PYTHONPYCACHEPREFIX",
)
# Where Singularity mounts the driver's libraries.
_ENGINE_LIBRARIES = "/.singularity.d/libs"
# The host's language does not reach the image.
_LANGUAGE = ("LANGUAGE", "LC_")
# These name folders and files of the host, which may not exist inside.
PLACES = (
    "TMPDIR",
    "TMP",
    "TEMP",
    "TEMPDIR",
    "XDG_RUNTIME_DIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
)


def identify_image(environment: Mapping[str, str]) -> dict[str, Any]:
    """The image's identity, and in `verified_by` who checked it: runner, entrypoint or "declared".

    "declared": a digest is only claimed by the EDF: the image's file can't be read from here, or
    neither the image nor a record at hand holds its OCI digest.
    environment: the process's.
    Errors: UsageError when no image is pinned; PostTrainingError when it is not the pinned one.
    """
    is_sif = environment.get(f"{PIN}PATH", "").endswith(".sif")
    names = (*PINNED, "SIF_SHA256") if is_sif else PINNED
    pins = {name: environment.get(f"{PIN}{name}") for name in names}
    if missing := [name for name, value in pins.items() if not value]:
        raise UsageError(
            f"no image digest is pinned here ({PIN}{missing[0]} is not set)",
            hint="run it with the EDF that `make push-sqsh` rendered; --unpinned runs it anyway "
            "and the record says so",
        )
    path = Path(pins["PATH"])
    reference = parse_reference(pins["PATH"]) if is_reference(pins["PATH"]) else None
    if reference is None:
        record = read_record_beside(path, pins["SQSH_SHA256"])
    else:
        record = read_record_at(Path(environment.get(f"{PIN}RECORD", "/nowhere")))
    said = read_image(ROOT)
    is_bound = check_identity(environment, said, record)
    verified_by, check = _verify(path, pins, is_sif=is_sif)
    if reference is not None and verified_by == "declared":
        verified_by, check = _verify_reference(reference, record)
    found = _read_json(FINDINGS / "image.json") or {}
    is_bound = is_bound or bool(found.get("oci_digest"))
    if said.get("over_sif"):
        check_layer(path, pins)
    # Hashed is the SIF; only its record says which squashfs is in it.
    if not is_bound or (is_sif and record is None):
        verified_by = "declared"
    identity = {
        "name": said["name"],
        "version": said["version"],
        "input_hash": said["input_hash"],
        "oci_digest": pins["OCI_DIGEST"],
        "sqsh_sha256": pins["SQSH_SHA256"],
        "path": str(path),
        "checkout": (record or found).get("checkout"),
        "verified_by": verified_by,
        "check": check,
    }
    if registries := (record or found).get("registries"):
        identity["registries"] = registries
    if is_sif:
        identity["sif_sha256"] = pins["SIF_SHA256"]
    return identity


def read_development_mount() -> dict[str, Any] | None:
    """Commit and changes of the checkout that is mounted over the image's code; None for none."""
    return _read_json(FINDINGS / "dev.json")


def read_mounts() -> list[str]:
    """The EDF's mounts as our runner made them, SRC:DST[:FLAGS]; empty under another engine."""
    return _read_json(FINDINGS / "mounts.json") or []


def find_mounts_over_image() -> list[str]:
    """Where something is mounted over the image's files.

    Over any file, where our runner made the mounts; under another engine, over programs, libraries
    and settings.
    """
    said = read_image(ROOT) or {}
    table = Path("/proc/self/mountinfo").read_text()
    over = set(mounts_over_code(table, has_layer=bool(said.get("over_sif"))))
    return sorted(over | set(_read_json(FINDINGS / "mounted_over.json") or []))


def foreign_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which other code than the image's may run in this process."""
    return code_variables(environment, read_image_variables(), [str(DEVELOPMENT_SOURCES)])


def missing_path_hint(path: Path) -> str | None:
    """Why a path that exists on the host may be missing here; None where that is not known."""
    return explain_missing(path, read_mounts() if IMAGE_FILE.exists() else None)


def explain_missing(path: Path, mounted: list[str] | None) -> str | None:
    """A hint for a missing path, or None. mounted: as of `read_mounts`; None outside an image."""
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"{path} looks like a name on the Hugging Face hub (there is no folder {path.parent} "
            f"here). A run downloads nothing: `post-training model fetch {path} --hub-dir hub` "
            "does, and prints what to write instead (for a dataset: `data fetch`)"
        )
    # Where a link leads to: the link may lie in a mounted folder and its target outside.
    place = Path(os.path.realpath(path))
    targets = [text.split(":")[1] for text in mounted or []]
    if mounted is None or any(place.is_relative_to(target) for target in targets):
        return None
    return (
        f"{place} is not below a folder that is mounted in the image ({', '.join(targets)}): "
        f"`post-training edf run --mount {place}:{place} …`, or an EDF with one more mount"
    )


def is_code_of_image(path: Path) -> bool:
    """Whether the file is one of the image's programs, libraries or settings, links resolved."""
    place = Path(os.path.realpath(path))
    return IMAGE_FILE.exists() and any(place.is_relative_to(code) for code in _CODE)


def is_over_code(place: Path) -> bool:
    """Whether a mount at `place` hides, or adds to, the image's programs, libraries or settings."""
    if str(place) in _HARMLESS:
        return False
    return any(place.is_relative_to(code) or code.is_relative_to(place) for code in _CODE)


def is_over_files(place: Path, earlier: Sequence[Path]) -> bool:
    """Whether a mount at `place` would hide files of the image.

    Called before the mount, in the image's root. place: without symbolic links. earlier: where
    something is mounted already.
    """
    if any(place.is_relative_to(other) for other in (*earlier, *_DATA)):
        return False
    if is_over_code(place):
        return True
    if not os.path.isdir(place):
        return os.path.lexists(place) and str(place) not in _HARMLESS
    try:
        return bool(os.listdir(place))
    except PermissionError:
        return True


def mounts_over_code(mount_table: str, *, has_layer: bool = False) -> list[str]:
    """Where something is mounted over the image's code, but for the node's drivers.

    mount_table: the text of /proc/self/mountinfo. has_layer: the image is a SIF and a layer, which
    Singularity mounts, by the kernel or by squashfuse.
    """
    places = {
        place
        for place, kind in parse_mount_table(mount_table)
        if not (has_layer and place in LAYER_FOLDERS and "squash" in kind)
    }
    return sorted(p for p in places if is_over_code(Path(p)) and not _DRIVER.fullmatch(p))


def code_variables(
    variables: Mapping[str, str], image_variables: Mapping[str, str], allowed: Sequence[str] = ()
) -> dict[str, str]:
    """The variables by which other code than the image's may run.

    image_variables: what the image itself sets. allowed: further folders that may be named, since
    the record has them elsewhere.
    """
    found = {}
    for name in _VARIABLES:
        value = variables.get(name, "")
        if not value or value == image_variables.get(name):
            continue
        if name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
            own = [*image_variables.get(name, "").split(":"), _ENGINE_LIBRARIES, *allowed]
            added = [word for word in value.split(":") if word not in own]
            # A folder that does not exist changes nothing.
            if not any(os.path.exists(word or ".") for word in added):
                continue
        found[name] = value
    return found


def host_variables(variables: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(the host's variables that reach the image, the names of those that would choose its code).

    Those that choose a language are dropped too. An EDF's [env] can set any of them.
    """
    dropped = [name for name in _VARIABLES if variables.get(name)]
    return {
        name: value
        for name, value in variables.items()
        if name not in _VARIABLES and not name.startswith(_LANGUAGE)
    }, dropped


def without_lost_places(variables: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """`variables` without those that name a folder or file of the host which is not here.

    own: what the image and the EDF set; these stay.
    """
    return {
        name: value
        for name, value in variables.items()
        if name not in PLACES or name in own or os.path.exists(value)
    }


def _verify(path: Path, pins: Mapping[str, str], *, is_sif: bool) -> tuple[str, str | None]:
    """(who checked the image's file, "hashed" or "cached"); None where nobody could."""
    pinned = pins["SIF_SHA256" if is_sif else "SQSH_SHA256"]
    found = _read_json(FINDINGS / "image.json")
    if found is not None:
        # The runner compared them before it started us; a variable may have been changed since.
        for name, expected in (("sha256", pinned), ("oci_digest", pins["OCI_DIGEST"])):
            if found.get(name) not in (expected, None):
                variable = "SQSH_SHA256" if name == "sha256" else "OCI_DIGEST"
                raise PostTrainingError(
                    f"the runner verified {found[name]}, but {PIN}{variable} is {expected}"
                )
        return "runner", found["check"]
    if path.exists():
        return "entrypoint", check_image_digest(path, pinned).check
    return "declared", None


def _verify_reference(
    reference: Reference, record: Mapping[str, Any] | None
) -> tuple[str, str | None]:
    """(who checked an image that the engine got from a registry, how); see `_verify`.

    The engine fetches by the manifest's digest. What is left to check is that this manifest is of
    the image whose files are here: the record, which was compared with them, says which it is.
    Errors: PostTrainingError when the record says another.
    """
    if record is None:
        return "declared", None
    if record.get("seal") != seal(record):
        raise PostTrainingError("the record was changed after the push", where=str(reference))
    known = (record.get("registries") or {}).get(reference.name)
    if known != reference.digest:
        raise PostTrainingError(
            f"the image's record knows {known or 'no digest'} under this name",
            where=str(reference),
            hint="render the EDF again after `post-training image push`",
        )
    return "entrypoint", "reference"


def check_layer(sif: Path, pins: Mapping[str, str]) -> None:
    """Errors: PostTrainingError unless the layer beside the SIF, in the store, is the pinned one,
    and both are the pair of the image's digest."""
    layer = sif.with_name(f"sha256-{pins['SQSH_SHA256']}.sqsh")
    if layer.exists():
        check_image_digest(layer, pins["SQSH_SHA256"])
    if pair_digest(pins["SIF_SHA256"], pins["SQSH_SHA256"]) != pins["OCI_DIGEST"]:
        raise PostTrainingError(
            f"{PIN}OCI_DIGEST is not that of this SIF and this layer",
            where=str(sif),
            hint="run it with the EDF that was rendered for this image",
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PostTrainingError(f"not a JSON record: {error}", where=str(path)) from None
