"""Which image is this process in, and who checked it? Asked by the entrypoint, inside the image.

/etc/post-training/                what the image says of itself (identity.py)
POST_TRAINING_IMAGE_*              what the EDF pins, or for a SIF the command line: claims
/run/post-training/image.json      what our runner found before it started us
the image store's record           commit and package lists, where the store is mounted
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.images.edf import own_variables
from post_training.images.identity import (
    IMAGE_FILE,
    check_identity,
    check_image_digest,
    read_image,
    read_record_beside,
)

# What lets other code than the image's run inside it: mounts over its files, and variables.
#
# Such a run is not reproducible by the image's digest, and its record names them.


# Programs, libraries, packages, and what says where they are.
_CODE = tuple(
    Path(name)
    for name in ("/opt/post-training", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
)
# Where every engine mounts the host's files, and where people mount data; no code is there.
_HARMLESS = {
    *(f"/etc/{name}" for name in ("hosts", "hostname", "resolv.conf", "localtime", "timezone")),
    *("/etc/passwd", "/etc/group", "/etc/mtab", "/"),
}
_DATA = tuple(Path(f"/{name}") for name in ("home", "mnt", "media", "proc", "root", "run", "srv",
                                            "sys", "dev", "tmp", "var/tmp"))  # fmt: skip
# Drivers and networks that a site's own engine brings: they go with the node, not with the image.
_DRIVER = re.compile(
    r"/(usr/)?lib(32|64)?/(\w+-linux-gnu/)?([\w.-]+/)*"
    r"(lib(cuda|nv|EGL|GL|OpenCL|vdpau|cxi|fabric|nccl-net|nccl-tuner|rccl-net|gdrapi|xpmem|lnx"
    r"|munge|pmi|slurm|jansson|json-c)[\w.+-]*\.so[\w.]*|firmware/nvidia/.*)"
    r"|/usr/bin/nvidia[\w-]*|/usr/share/(nvidia|glvnd|egl|vulkan)/.*|/etc/(nvidia|vulkan|OpenCL)/.*"
)

# Each names code, or where it is looked for before the image's.
_VARIABLES = (
    *("LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "GCONV_PATH", "GLIBC_TUNABLES"),
    *("BASH_ENV", "ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE"),
    *("PYTHONEXECUTABLE", "PYTHONPLATLIBDIR", "PYTHONPYCACHEPREFIX"),
)
# Where Singularity mounts the driver's libraries.
_ENGINE_LIBRARIES = "/.singularity.d/libs"
# Of the host's shell; the image has its own, or none is needed.
_LANGUAGE = ("LANGUAGE", "LC_")
# Folders and files of the host, which may not be there inside.
PLACES = (
    *("TMPDIR", "TMP", "TEMP", "TEMPDIR", "XDG_RUNTIME_DIR"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)


def is_over_code(place: Path) -> bool:
    """Whether a mount at `place` hides, or adds to, the image's programs, libraries or settings."""
    if str(place) in _HARMLESS:
        return False
    return any(place.is_relative_to(code) or code.is_relative_to(place) for code in _CODE)


def is_over_files(place: Path, earlier: Sequence[Path]) -> bool:
    """Whether a mount at `place` hides files of the image. Asked before it is made, in the image's
    root. place: without links. earlier: where other things are mounted already."""
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


def mounts_over_code(mount_table: str) -> list[str]:
    """Of the process's mounts (/proc/self/mountinfo), those over the image's code; not the drivers
    of the node."""
    # Spaces are written as \040.
    octal = re.compile(r"\\([0-7]{3})")
    places = {
        octal.sub(lambda match: chr(int(match[1], 8)), line.split()[4])
        for line in mount_table.splitlines()
    }
    return sorted(p for p in places if is_over_code(Path(p)) and not _DRIVER.fullmatch(p))


def code_variables(
    variables: Mapping[str, str], image_variables: Mapping[str, str], allowed: Sequence[str] = ()
) -> dict[str, str]:
    """Of the variables, those by which other code than the image's may run.

    image_variables: what the image itself sets. allowed: folders that are accounted for elsewhere.
    """
    found = {}
    for name in _VARIABLES:
        value = variables.get(name, "")
        if not value or value == image_variables.get(name):
            continue
        if name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
            own = [*image_variables.get(name, "").split(":"), _ENGINE_LIBRARIES, *allowed]
            added = [word for word in value.split(":") if word not in own]
            # A folder that is not there has no say.
            if not any(os.path.exists(word or ".") for word in added):
                continue
        found[name] = value
    return found


def host_variables(variables: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The host's variables without those that would choose code or language inside; and which of
    the first there were. An EDF's [env] can set them."""
    dropped = [name for name in _VARIABLES if variables.get(name)]
    return {
        name: value
        for name, value in variables.items()
        if name not in _VARIABLES and not name.startswith(_LANGUAGE)
    }, dropped


def without_lost_places(variables: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """`variables` without those of the host that name a folder or file which is not here.

    own: what the image and the EDF set, which stays.
    """
    return {
        name: value
        for name, value in variables.items()
        if name not in PLACES or name in own or os.path.exists(value)
    }


# Which image is this process in, and who checked it? Asked by the entrypoint, inside the image.


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
