"""`post-training edf check FILE`: every fault of an EDF at once, before a job waits in a queue.

Found is what the engine would refuse (keys, variables, mounts), and what would make a run silently
wrong: a secret in [env], an image that is not the pinned or the released one, a network setting
that corrupts data. There are two engines on Alps, each with rules of its own (`--dialect`):

    ce       the Container Engine: `srun --environment`; a squashfs file, or an image in a registry
    sarus    Sarus Suite, its successor: `srun --edf`; an image in a registry alone

Unless one is named, an EDF of a file must suit both but for its image, and one of a registry sarus.
Sarus' rules are read in https://github.com/sarus-suite (raster, podman-driver, skybox).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from post_training.core.errors import PostTrainingError
from post_training.core.secrets import variable_secret
from post_training.images.edf import Edf, examine_edf, merge_edf
from post_training.images.identity import (
    PIN,
    PINNED,
    image_digest,
    read_record_at,
    read_record_beside,
    seal,
)
from post_training.images.reference import is_loopback, is_reference, parse_reference

PROFILE = "POST_TRAINING_NETWORK_PROFILE"
# The network's settings are the site's hook's, whatever they are when a run starts.
HOOK_PROFILE = "alps-hook"
ALLOW_LL128 = "POST_TRAINING_ALLOW_LL128"
Dialect = Literal["ce", "sarus"]
DIALECTS: tuple[Dialect, ...] = ("ce", "sarus")
_HOOKS = "com.hooks."
_NOT_IN_SARUS = ("ssh", "netstack")
_SEARCHED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
_EMPTY_DEFAULT = re.compile(r"\$\{\w+:-\}")
# SRC:DST[:FLAGS].
_MOUNT = re.compile(r"[^:]+:[^:]+(:[^:]+)?")


def check_edf(
    path: Path,
    env: Mapping[str, str],
    cwd: Path,
    releases: Sequence[Mapping[str, Any]],
    *,
    sources_are_here: bool = True,
    dialect: Dialect | None = None,
) -> list[str]:
    """Every fault of the EDF, a line each: `file: key: what`.

    env, cwd, sources_are_here: as of `load_edf`. releases: the entries of containers/images.lock.
    dialect: the engine's; None: both, as far as one EDF can suit both.
    """
    try:
        edf, faults = examine_edf(path, env, cwd, sources_are_here=sources_are_here)
    except PostTrainingError as error:
        return [str(error).split("\nhint: ")[0]]
    written = _merged(path, env, cwd).get("env", {})
    here = [*secret_faults(edf.env), *network_faults(edf.env), *search_faults(edf.env, written)]
    if dialect is None and is_reference(edf.image):
        dialect = "sarus"
    if dialect != "ce":
        here = [*successor_faults(path, env, cwd), *here]
    if dialect == "ce":
        here = [*_ce_faults(path, env, cwd), *here]
    if dialect == "sarus":
        here = [*_sarus_faults(path, env, cwd), *here]
    if is_reference(edf.image):
        here += _reference_faults(edf)
    elif edf.image and dialect != "sarus":
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


def search_faults(variables: Mapping[str, str], written: Mapping[str, str]) -> list[str]:
    """A fault where programs or libraries would also be looked for in the working directory: that
    is what an empty part of such a list means. written: [env] before it is expanded, since
    `${LD_LIBRARY_PATH:-}` may be empty on another machine only."""
    faults = []
    for name in _SEARCHED:
        texts = (variables.get(name, ""), _EMPTY_DEFAULT.sub("", written.get(name, "")))
        if any(text and "" in text.split(":") for text in texts):
            faults.append(
                f"env.{name}: has an empty part, which means the working directory: what lies "
                f"there would be loaded instead of what the image has (got {written.get(name)!r}). "
                f"In the place of ${{{name}:-}} write ${{{name}:-/some/folder}}"
            )
    return faults


def successor_faults(path: Path, env: Mapping[str, str], cwd: Path) -> list[str]:
    """What the engine's successor would refuse, or take otherwise."""
    merged = _merged(path, env, cwd)
    if not merged:
        return []
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


def _ce_faults(path: Path, env: Mapping[str, str], cwd: Path) -> list[str]:
    """What the Container Engine takes otherwise than its successor."""
    merged = _merged(path, env, cwd)
    faults = [
        f"mounts[{index}]: {text!r}: flags are joined by + in the Container Engine"
        for index, text in enumerate(merged.get("mounts", []))
        if "," in text.partition(":")[2].partition(":")[2]
    ]
    if merged.get("devices"):
        faults.append("devices: the Container Engine has no such key; its hooks bring devices")
    return faults


def _sarus_faults(path: Path, env: Mapping[str, str], cwd: Path) -> list[str]:
    """What Sarus Suite refuses, ignores, or takes otherwise than the Container Engine."""
    merged = _merged(path, env, cwd)
    faults = []
    image = merged.get("image", "")
    if not is_reference(image):
        faults.append(
            f"image: Sarus takes REGISTRY/NAME@sha256:… alone, no file and no variables, and a tag "
            f"may be moved (got {image!r}): `post-training image push`, then render the EDF again"
        )
    elif is_loopback(image):
        faults.append(f"image: {image.partition('/')[0]} is another machine on each node")
    for index, text in enumerate(merged.get("mounts", [])):
        source, _, flags = text.split(":", 2) if text.count(":") == 2 else (text, "", "")
        words = re.split("[+,]", flags)
        if "sqsh" in words:
            faults.append(f"mounts[{index}]: {text!r}: Sarus mounts no squashfs")
        elif "+" in flags:
            # The flags go to `podman run --volume` as they are.
            faults.append(f"mounts[{index}]: {text!r}: flags are joined by commas in Sarus")
        if not source.startswith(("/", "./", "../", "$")):
            faults.append(f"mounts[{index}]: {text!r}: its source must begin with / or ./ in Sarus")
    annotations = merged.get("annotations", {})
    on = {name for name, value in annotations.items() if value not in ("false", "")}
    if f"{_HOOKS}aws_ofi_nccl.enabled" in on and f"{_HOOKS}cxi.enabled" not in on:
        faults.append(
            f"annotations: {_HOOKS}aws_ofi_nccl.enabled does not switch on CXI in Sarus: write "
            f'"{_HOOKS}cxi.enabled" = "true" too'
        )
    for name in sorted(on):
        if name.startswith(tuple(f"{_HOOKS}{hook}." for hook in _NOT_IN_SARUS)):
            faults.append(f"annotations: {name}: Sarus has no such hook")
        if name == f"{_HOOKS}aws_ofi_nccl.variant":
            faults.append(f"annotations: {name}: Sarus ignores it")
    return faults


def _merged(path: Path, env: Mapping[str, str], cwd: Path) -> dict[str, Any]:
    try:
        return merge_edf(path, env, cwd)
    except PostTrainingError:
        return {}  # `check_edf` has these faults already.


def _reference_faults(edf: Edf) -> list[str]:
    """Where the pins and the store's record are of another image than the one in the registry."""
    pins = {name: edf.env.get(f"{PIN}{name}") for name in PINNED}
    faults = [f"env.{PIN}{name}: missing" for name, value in pins.items() if not value]
    if faults:
        return [*faults, "image: not pinned: `post-training edf render` writes what is missing"]
    if edf.image != pins["PATH"]:
        faults.append(f"env.{PIN}PATH: is {pins['PATH']}, image is {edf.image}")
    try:
        record = read_record_at(Path(edf.env.get(f"{PIN}RECORD", "/nowhere")))
    except PostTrainingError as error:
        return [*faults, f"image: {error.where}: {error.problem}"]
    if record is None:
        return faults  # Rendered elsewhere: the entrypoint says what it could not compare.
    reference = parse_reference(edf.image)
    known = (record.get("registries") or {}).get(reference.name)
    if known != reference.digest:
        faults.append(f"image: is {reference.digest}, the image's record has {known} there")
    return [
        *faults,
        *(
            f"env.{PIN}{key.upper()}: is {pins[key.upper()]}, the image's record has "
            f"{record.get(key)}"
            for key in ("oci_digest", "sqsh_sha256", "input_hash")
            if pins[key.upper()] != record.get(key)
        ),
    ]


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
