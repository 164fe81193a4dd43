"""What lets other code than the image's run inside it: mounts over its files, and variables.

Such a run is not reproducible by the image's digest, and its record names them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

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
