"""`post-training edf check FILE`: every fault of an EDF at once, before a job waits in a queue.

Found is what the engine would refuse (keys, variables, mounts); what its successor would refuse
(https://github.com/sarus-suite/raster); and what would make a run silently wrong: a secret in
[env], an image that is not the pinned or the released one, a network setting that corrupts data.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.secrets import variable_secret
from post_training.images.edf import Edf, examine_edf, merge_edf
from post_training.images.identity import PIN, PINNED, image_digest, read_record_beside, seal

PROFILE = "POST_TRAINING_NETWORK_PROFILE"
# The network's settings are the site's hook's, whatever they are when a run starts.
HOOK_PROFILE = "alps-hook"
ALLOW_LL128 = "POST_TRAINING_ALLOW_LL128"
# SRC:DST[:FLAGS].
_MOUNT = re.compile(r"[^:]+:[^:]+(:[^:]+)?")


def check_edf(
    path: Path,
    env: Mapping[str, str],
    cwd: Path,
    releases: Sequence[Mapping[str, Any]],
    *,
    sources_are_here: bool = True,
) -> list[str]:
    """Every fault of the EDF, a line each: `file: key: what`.

    env, cwd, sources_are_here: as of `load_edf`. releases: the entries of containers/images.lock.
    """
    try:
        edf, faults = examine_edf(path, env, cwd, sources_are_here=sources_are_here)
    except PostTrainingError as error:
        return [str(error).split("\nhint: ")[0]]
    here = [*successor_faults(path, env, cwd), *secret_faults(edf.env), *network_faults(edf.env)]
    if edf.image:
        here += _image_faults(edf, cwd, releases)
    return [*faults, *(f"{path}: {fault}" for fault in here)]


def secret_faults(variables: Mapping[str, str]) -> list[str]:
    """A line for each variable that holds a secret; never its value."""
    hint = "is exported and printed by tools: mount a token file and name its path"
    return [
        f"env.{name}: holds a secret ({kind}), and [env] {hint}"
        for name, value in variables.items()
        if (kind := variable_secret(name, value))
    ]


def network_faults(variables: Mapping[str, str]) -> list[str]:
    """A fault where NCCL may use LL128, which corrupts data silently on GH200 with Slingshot.

    Source: https://github.com/NVIDIA/nccl/issues/2001
    """
    profile = variables.get(PROFILE, "")
    if not profile.startswith("alps-") or variables.get(ALLOW_LL128) == "1":
        return []
    protocols = variables.get("NCCL_PROTO")
    names = (protocols or "").removeprefix("^").split(",")
    # `^` begins a list of protocols that are not to be used.
    if protocols and ("LL128" in names) == protocols.startswith("^"):
        return []
    return [
        f"env.NCCL_PROTO: must be ^LL128 on Alps, where LL128 corrupts data silently (got "
        f"{protocols!r}); {ALLOW_LL128}=1 lifts this, and the record says so"
    ]


def successor_faults(path: Path, env: Mapping[str, str], cwd: Path) -> list[str]:
    """What the engine's successor would refuse, or take otherwise."""
    try:
        merged = merge_edf(path, env, cwd)
    except PostTrainingError:
        return []  # `check_edf` has these faults already.
    faults = []
    for index, text in enumerate(merged.get("mounts", [])):
        if not _MOUNT.fullmatch(text):
            faults.append(
                f"mounts[{index}]: {text!r}: the engine's successor refuses a bare path: write "
                f"{text}:{text}"
            )
    if "entrypoint" not in merged:
        faults.append("entrypoint: not written: its default differs between the engines")
    return faults


def _image_faults(edf: Edf, cwd: Path, releases: Sequence[Mapping[str, Any]]) -> list[str]:
    pins = {name: edf.env.get(f"{PIN}{name}") for name in PINNED}
    faults = [f"env.{PIN}{name}: missing" for name, value in pins.items() if not value]
    if faults:
        return [*faults, "image: not pinned: `post-training edf render` writes what is missing"]
    image = cwd / edf.image
    if str(image) != pins["PATH"]:
        faults.append(f"env.{PIN}PATH: is {pins['PATH']}, image is {edf.image}")
    is_sif = image.suffix == ".sif"
    expected = edf.env.get(f"{PIN}SIF_SHA256") if is_sif else pins["SQSH_SHA256"]
    try:
        found = image_digest(image).sha256
    except PostTrainingError as error:
        return [*faults, f"image: {error.problem}: {image}"]
    if found != expected:
        faults.append(f"image: its sha256 is {found}, pinned is {expected}")
    return [*faults, *_record_faults(image, pins, releases)]


def _record_faults(
    image: Path, pins: Mapping[str, str | None], releases: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Where the pins differ from the image's record, or the record from the release."""
    try:
        record = read_record_beside(image, str(pins["SQSH_SHA256"]))
    except PostTrainingError as error:
        return [f"image: {error.where}: {error.problem}"]
    if record is None:
        return []  # The file was copied without its record; its sha256 was compared.
    faults = [
        f"env.{PIN}{key.upper()}: is {pins[key.upper()]}, the image's record has {record.get(key)}"
        for key in ("oci_digest", "input_hash")
        if pins[key.upper()] != record.get(key)
    ]
    if record.get("seal", seal(record)) != seal(record):
        faults.append("image: its record in the store was changed after the push")
    for entry in releases:
        same = all(entry[key] == record.get(key) for key in ("name", "version", "platform"))
        if same and entry["oci_digest"] != record["oci_digest"]:
            faults.append(
                f"image: is {record['oci_digest']}, but {entry['name']} {entry['version']} is "
                f"released as {entry['oci_digest']} (containers/images.lock)"
            )
    return faults
