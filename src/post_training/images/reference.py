"""What names an image in a registry: REGISTRY/NAME, and a manifest's digest.

Standard library only: this is read at the start of every process of a job.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from post_training.core.errors import UsageError

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# A host has a dot or a port, or is `localhost`: else `NAME/NAME` would mean Docker's own registry.
_HOST = re.compile(
    r"(?:localhost|[a-z0-9-]+(?:\.[a-z0-9-]+)+|[a-z0-9-]+(?=:)|\[[0-9a-f:]+\])(?::[0-9]+)?", re.I
)
_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")


class Reference(NamedTuple):
    """An image in a registry. name: REGISTRY/NAME. digest: of its manifest, `sha256:<hex>`."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"


def parse_name(text: str) -> str:
    """REGISTRY/NAME. Errors: UsageError for what is none, or has a tag, a digest or a password."""
    name = _without_scheme(text)
    host, _, rest = name.partition("/")
    if "@" in rest or ":" in rest:
        raise UsageError(
            f"must be REGISTRY/NAME, without a tag or digest (got {text!r})",
            hint="the tag is made of the image's version and digest",
        )
    if not _HOST.fullmatch(host) or not all(_PART.fullmatch(part) for part in rest.split("/")):
        raise UsageError(
            f"must be REGISTRY/NAME, as ghcr.io/me/post-training, in small letters (got {text!r})"
        )
    return name


def parse_reference(text: str) -> Reference:
    """REGISTRY/NAME@sha256:<64 digits>; a tag before the `@` is ignored.

    Errors: UsageError; a tag alone is refused, since it may be moved.
    """
    name, at, digest = _without_scheme(text).rpartition("@")
    if not at or not DIGEST.fullmatch(digest):
        raise UsageError(
            f"must be REGISTRY/NAME@sha256:… with 64 digits (got {text!r})",
            hint="a tag may be moved; `skopeo inspect docker://NAME:TAG` shows the digest of one",
        )
    folder, slash, last = name.rpartition("/")
    return Reference(parse_name(folder + slash + last.partition(":")[0]), digest)


def registry_reference(record: Mapping[str, Any]) -> Reference:
    """Where a stored image is in a registry; of several, the last. Errors: UsageError for none."""
    if found := known_references(record):
        return found[-1]
    raise UsageError(
        f"{record['name']} {record['version']} is in no registry, and this site's engine takes an "
        "image from there alone",
        where=record["oci_digest"],
        hint=f"`post-training image push {record['oci_digest'][7:19]} REGISTRY/NAME`",
    )


def is_reference(image: str) -> bool:
    """Whether an EDF's image is one in a registry, by its digest."""
    try:
        parse_reference(image)
    except UsageError:
        return False
    return True


def _without_scheme(text: str) -> str:
    """Errors: UsageError for a user or password, which is not shown."""
    text = text.removeprefix("docker://")
    host, slash, _ = text.partition("/")
    if slash and "@" in host:
        raise UsageError(
            "a user or password stands before the registry's name",
            hint=f"skopeo login {host.rpartition('@')[2]}",
        )
    return text


def known_references(*told: Mapping[str, Any]) -> list[Reference]:
    """Where an image is, by what records of it, of its runs or of its release say."""
    found = [
        Reference(name, digest)
        for each in told
        for name, digest in (each.get("registries") or {}).items()
    ]
    return list(dict.fromkeys(found))


def is_loopback(name: str) -> bool:
    """Whether REGISTRY/NAME is a registry on this machine, by its own loopback address."""
    host = name.partition("/")[0]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
