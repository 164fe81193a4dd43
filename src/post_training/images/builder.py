"""The program that builds images on this machine: buildah, or podman where that is missing (Alps).

podman builds with buildah's own code, so equal inputs give equal digests from both. This file hides
which of the two it is.
"""

import json
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from post_training.core.errors import PostTrainingError
from post_training.core.process import run_tool

# The default, crun, refuses to start where control groups are of version 1, or missing.
_RUNTIME = "--runtime=runc"


class StoredImage(NamedTuple):
    """An image in the builder's storage. oci_digest: `sha256:<hex>` of the OCI config."""

    oci_digest: str
    labels: dict[str, str]
    environment: dict[str, str]


def program() -> str:
    """`buildah` or `podman`; where there is neither, `buildah`, which the error then names."""
    return "podman" if shutil.which("podman") and not shutil.which("buildah") else "buildah"


def version() -> dict[str, str]:
    """{program: its version}, for the image's record."""
    return {program(): run_tool([program(), "--version"])}


def build(options: Sequence[str | Path]) -> None:
    """Build an image and show the output. options: those that buildah and podman share."""
    verb = ["buildah", "bud", _RUNTIME] if program() == "buildah" else _podman("build")
    run_tool([*verb, *options], show=True, ends_with_us=signal.SIGTERM)


def stored_tags() -> dict[str, str]:
    """{tag: OCI digest} of all images in the builder's storage that have a tag, not only ours."""
    if program() == "buildah":
        listed = json.loads(run_tool(["buildah", "images", "--json", "--no-trunc"]) or "[]") or []
        names, identifier = "names", "id"
    else:
        listed = json.loads(run_tool(["podman", "images", "--format", "json"]) or "[]") or []
        names, identifier = "Names", "Id"
    # podman leaves the prefix out.
    return {
        tag: f"sha256:{image[identifier].removeprefix('sha256:')}"
        for image in listed
        for tag in image.get(names) or []
    }


def stored_image(tag: str) -> StoredImage | None:
    """The image of this tag in the builder's storage, or None."""
    if tag not in stored_tags():
        return None
    if program() == "buildah":
        inspected = json.loads(run_tool(["buildah", "inspect", "--type", "image", tag]))
        return _stored(inspected["FromImageID"], inspected["OCIv1"]["config"])
    [inspected] = json.loads(run_tool(["podman", "image", "inspect", tag]))
    return _stored(inspected["Id"], inspected["Config"])


def remove(tag: str) -> None:
    """Remove an image from the builder's storage; nothing where it has none of this tag.

    Layers that no other image has go too, and containers that a killed push left of it.
    """
    try:
        run_tool([program(), "rmi", "--force", tag])
    except PostTrainingError:
        # Another process may have been faster: pulls at once find the same leftovers.
        if tag in stored_tags():
            raise


@contextmanager
def mounted(tag: str, container: str) -> Iterator[Path]:
    """Mount the image by the builder and yield its root file system; nothing is copied.

    container: a name that nobody else uses at this time; one left by a killed process is removed.
    An ordinary user can do this inside `podman unshare` or `buildah unshare` only.
    """
    if program() == "buildah":
        listed = run_tool(["buildah", "containers", "--format", "{{.ContainerName}}"])
        if container in listed.split():
            run_tool(["buildah", "rm", container])
        run_tool(["buildah", "from", "--pull-never", f"--name={container}", tag])
        try:
            yield Path(run_tool(["buildah", "mount", container]))
        finally:
            run_tool(["buildah", "rm", container])
        return
    try:
        yield Path(run_tool(["podman", "image", "mount", tag]))
    finally:
        run_tool(["podman", "image", "unmount", tag])


def run_in(image: str, platform: str, script: str) -> str:
    """Run a shell script in an image of a registry, with this machine's network; its stdout."""
    if program() == "podman":
        words = _podman(
            "run", "--rm", "--network=host", "--entrypoint=", f"--platform={platform}", image
        )
        return run_tool([*words, "sh", "-c", script])
    container = run_tool(["buildah", "from", f"--platform={platform}", image])
    try:
        return run_tool(
            ["buildah", "run", _RUNTIME, "--network=host", container, "--", "sh", "-c", script]
        )
    finally:
        run_tool(["buildah", "rm", container])


def run_offline(
    tag: str,
    command: Sequence[str],
    *,
    volumes: Mapping[str, Path],
    environment: Mapping[str, str],
) -> None:
    """Run a command in an image of the builder's storage, without a network, and show its output.

    volumes: {folder in the container: folder of this machine}. What the command writes elsewhere is
    gone with the container. environment: further variables.
    Errors: PostTrainingError where it fails.
    """
    options = [
        "--network=none",
        *(f"--volume={source}:{target}" for target, source in volumes.items()),
        *(f"--env={name}={value}" for name, value in environment.items()),
    ]
    if program() == "podman":
        words = _podman("run", "--rm", "--pull=never", "--entrypoint=", *options, tag)
        run_tool([*words, *command], show=True, ends_with_us=signal.SIGTERM)
        return
    container = run_tool(["buildah", "from", "--pull-never", tag])
    try:
        run_tool(
            ["buildah", "run", _RUNTIME, *options, container, "--", *command],
            show=True,
            ends_with_us=signal.SIGTERM,
        )
    finally:
        run_tool(["buildah", "rm", container])


def _podman(*words: str) -> list[str]:
    return ["podman", *([_RUNTIME] if shutil.which("runc") else []), *words]


def _stored(image_id: str, config: dict[str, Any]) -> StoredImage:
    environment = dict(line.split("=", 1) for line in config.get("Env") or [])
    return StoredImage(f"sha256:{image_id}", config.get("Labels") or {}, environment)
