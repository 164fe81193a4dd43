"""Which image is this process in, and who checked it? Asked by the entrypoint, inside the image.

/etc/post-training/image.json      what the image says of itself (input hash)
POST_TRAINING_IMAGE_*              what the EDF pins, or for a SIF the command line
/run/post-training/image.json      what our runner found before it started us
the image store's record           commit and package lists, where the store is mounted
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.images.verify import check_image_digest

IMAGE_FILE = Path("/etc/post-training/image.json")
# Where our runner leaves what it found and did, as NAME.json.
FINDINGS = Path("/run/post-training")
_STACK = Path("/opt/post-training")
_PINS = ("PATH", "OCI_DIGEST", "SQSH_SHA256", "INPUT_HASH")


def identify_image(environment: Mapping[str, str]) -> dict[str, Any]:
    """The image's identity and `verified_by`: "runner", "entrypoint" or "declared".

    "declared": the digest is the EDF's word, and only the input hash inside the image agrees with
    it, because the image's file cannot be read from here.
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
    said = _read_json(IMAGE_FILE)
    if said is None or said["input_hash"] != pins["INPUT_HASH"]:
        found = said["input_hash"] if said else "nothing"
        raise PostTrainingError(
            f"input hash is {found}, the EDF pins {pins['INPUT_HASH']}",
            where=str(IMAGE_FILE),
            hint="this is not the image that the EDF was rendered for",
        )
    path = Path(pins["PATH"])
    verified_by, check = _verify(path, pins["SIF_SHA256" if is_sif else "SQSH_SHA256"])
    beside = path.with_name(f"sha256-{pins['SQSH_SHA256']}.json")
    record = _read_json(beside if is_sif else path.with_suffix(".json")) or {}
    identity = {
        "name": said["name"],
        "version": said["version"],
        "input_hash": said["input_hash"],
        "oci_digest": pins["OCI_DIGEST"],
        "sqsh_sha256": pins["SQSH_SHA256"],
        "path": str(path),
        "checkout": record.get("checkout"),
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


def mounts_over_the_stack(mount_table: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """Where something is mounted over the image's own programs and packages, by whatever engine."""
    places = (line.split()[4] for line in mount_table.read_text().splitlines())
    return sorted({place for place in places if Path(place).is_relative_to(_STACK)})


def _verify(path: Path, pinned: str) -> tuple[str, str | None]:
    found = _read_json(FINDINGS / "image.json")
    if found is not None:
        # The runner compared it before it started us; this only guards against a later change
        # of the variables.
        if found["sha256"] != pinned:
            raise PostTrainingError(
                f"the runner verified {found['sha256']}, but "
                f"POST_TRAINING_IMAGE_SQSH_SHA256 is {pinned}"
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
