"""Which image is this process in, and who checked it? Asked by the entrypoint, inside the image.

/etc/post-training/                what the image says of itself (identity.py)
POST_TRAINING_IMAGE_*              what the EDF pins, or for a SIF the command line: claims
/run/post-training/image.json      what our runner found before it started us
the image store's record           commit and package lists, where the store is mounted
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.images.edf_variables import own_variables
from post_training.images.foreign_code import code_variables, mounts_over_code
from post_training.images.identity import IMAGE_FILE, check_identity, read_image, read_record_beside
from post_training.images.verify import check_image_digest

# Where our runner leaves what it found and did, as NAME.json.
FINDINGS = Path("/run/post-training")
ROOT = Path("/")
# What the entrypoint looks for code in when a checkout is mounted.
DEVELOPMENT_SOURCES = FINDINGS / "dev/src"
_PINS = ("PATH", "OCI_DIGEST", "SQSH_SHA256", "INPUT_HASH")


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def identify_image(environment: Mapping[str, str]) -> dict[str, Any]:
    """The image's identity and `verified_by`: "runner", "entrypoint" or "declared".

    "declared": a digest is the EDF's word, because the image's file cannot be read from here, or
    neither the image nor a record at hand says its OCI digest.
    Errors: UsageError when no image is pinned; PostTrainingError when it is not the pinned one.
    """
    is_sif = environment.get("POST_TRAINING_IMAGE_PATH", "").endswith(".sif")
    names = (*_PINS, "SIF_SHA256") if is_sif else _PINS
    pins = {name: environment.get(f"POST_TRAINING_IMAGE_{name}") for name in names}
    if missing := [name for name, value in pins.items() if not value]:
        raise UsageError(
            f"no image digest is pinned here (POST_TRAINING_IMAGE_{missing[0]} is not set)",
            hint="run it with the EDF that `make push-sqsh` rendered; --unpinned runs it anyway "
            "and the record says so",
        )
    path = Path(pins["PATH"])
    record = read_record_beside(path, pins["SQSH_SHA256"])
    said = read_image(ROOT)
    is_bound = check_identity(environment, said, record)
    verified_by, check = _verify(path, pins, is_sif=is_sif)
    found = _read_json(FINDINGS / "image.json") or {}
    is_bound = is_bound or bool(found.get("oci_digest"))
    # A SIF's own digest is hashed; that of the squashfs in it is its record's word.
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
    if is_sif:
        identity["sif_sha256"] = pins["SIF_SHA256"]
    return identity


def development_mount() -> dict[str, Any] | None:
    """Commit and changes of the checkout that is mounted over the image's code, if one is."""
    return _read_json(FINDINGS / "dev.json")


def mounts() -> list[str]:
    """The EDF's mounts as our runner made them; empty where another engine runs the EDF."""
    return _read_json(FINDINGS / "mounts.json") or []


def missing_path_hint(path: Path) -> str | None:
    """Why a path that the user has may not be here, as far as it can be told."""
    return explain_missing(path, mounts() if IMAGE_FILE.exists() else None)


def explain_missing(path: Path, mounted: list[str] | None) -> str | None:
    """A hint, or None. mounted: SRC:DST[:FLAGS]; None outside an image."""
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"{path} looks like a name on the Hugging Face hub: runs fetch nothing, so give the "
            "folder that it was downloaded to"
        )
    # Of a link, where it leads to: the link may be in a mounted folder, and what it names not.
    place = Path(os.path.realpath(path))
    targets = [text.split(":")[1] for text in mounted or []]
    if mounted is None or any(place.is_relative_to(target) for target in targets):
        return None
    return (
        f"{place} is not below a folder that is mounted in the image ({', '.join(targets)}): "
        f"`post-training edf run --mount {place}:{place} …`, or an EDF with one more mount"
    )


def mounts_over_the_image() -> list[str]:
    """Where something is mounted over the image's files: over any, where our runner made the
    mounts; over its programs, libraries and settings, where another engine did."""
    over = set(mounts_over_code(Path("/proc/self/mountinfo").read_text()))
    return sorted(over | set(_read_json(FINDINGS / "mounted_over.json") or []))


def foreign_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which other code than the image's may run in this process."""
    return code_variables(environment, own_variables(), [str(DEVELOPMENT_SOURCES)])


def _verify(path: Path, pins: Mapping[str, str], *, is_sif: bool) -> tuple[str, str | None]:
    pinned = pins["SIF_SHA256" if is_sif else "SQSH_SHA256"]
    found = _read_json(FINDINGS / "image.json")
    if found is not None:
        # The runner compared it before it started us; this only guards against a later change
        # of the variables.
        for name, expected in (("sha256", pinned), ("oci_digest", pins["OCI_DIGEST"])):
            if found.get(name) not in (expected, None):
                variable = "SQSH_SHA256" if name == "sha256" else "OCI_DIGEST"
                raise PostTrainingError(
                    f"the runner verified {found[name]}, but "
                    f"POST_TRAINING_IMAGE_{variable} is {expected}"
                )
        return "runner", found["check"]
    if path.exists():
        return "entrypoint", check_image_digest(path, pinned).check
    return "declared", None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PostTrainingError(f"not a JSON record: {error}", where=str(path)) from None
