"""containers/NAME/base.lock of a recipe whose base is an image in a registry.

The tag of recipe.toml is looked up once, by `image lock`, and pinned by the digest of the manifest
for the recipe's platform. A digest is the sha256 of the manifest's bytes, so what was read is
proved by hashing it. What could not be read stays `unresolved`, with the reason, and is not built.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json, write_json
from post_training.core.process import tool_bytes

UNRESOLVED = "unresolved"
_SCHEMA = "post-training/registry-base-lock/1"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


def lock_registry_base(path: Path, image: str, platform: str, source: str | None) -> str | None:
    """Resolve `image` and write its lock; None, or why it stays unresolved.

    source: where to read it instead of its registry, as skopeo names places: a mirror
    (`docker://MIRROR/NAME:TAG`) or a local OCI folder (`oci:/FOLDER:TAG`).
    A base that was resolved before keeps its digest when it can't be read now.
    """
    source = source or f"docker://{image}"
    try:
        found: dict[str, Any] = _resolve(source, platform)
        reason = None
    except (PostTrainingError, OSError) as error:
        reason = str(error)
        kept = _read(path) if path.exists() else {}
        if (kept.get("image"), kept.get("platform")) == (image, platform) and _is_digest(kept):
            return f"{reason}\nthe digest of an earlier time is kept"
        # In the file without this machine's addresses and places.
        found = {"digest": UNRESOLVED, "reason": f"skopeo could not read {image}"}
    write_json(path, {"schema": _SCHEMA, "image": image, "platform": platform, **found})
    return reason


def read_registry_base(path: Path, image: str, platform: str) -> str:
    """`NAME@sha256:…`, which a build starts from.

    Errors: UsageError when the lock is missing, unresolved, or of another base.
    """
    hint = f"`post-training image lock {path.parent.name}` where its registry can be reached"
    if not path.exists():
        raise UsageError("the base is not locked", where=str(path), hint=hint)
    lock = _read(path)
    for key, wanted in {"image": image, "platform": platform}.items():
        if lock.get(key) != wanted:
            problem = f"{key} is {lock.get(key)}, recipe.toml asks for {wanted}"
            raise UsageError(problem, where=str(path), hint=hint)
    if not _is_digest(lock):
        problem = f"the base has no digest: {lock.get('reason', lock.get('digest'))}"
        raise UsageError(problem, where=str(path), hint=hint)
    return f"{_name_of(image)}@{lock['digest']}"


def _resolve(source: str, platform: str) -> dict[str, Any]:
    manifest, digest = _manifest(source)
    found: dict[str, Any] = {}
    if manifest.get("mediaType") in _INDEX_TYPES or "manifests" in manifest:
        found["index_digest"] = digest
        system, architecture = platform.split("/")
        digests = [
            entry["digest"]
            for entry in manifest["manifests"]
            if entry.get("platform", {}).get("os") == system
            and entry.get("platform", {}).get("architecture") == architecture
        ]
        if len(digests) != 1:
            raise PostTrainingError(f"{len(digests)} images for {platform} in it", where=source)
        # Read too, and hashed: an index may name what its registry no longer has.
        manifest, digest = _manifest(source, expected=digests[0])
    if not _DIGEST.fullmatch(manifest.get("config", {}).get("digest", "")):
        raise PostTrainingError("not an image: its manifest names no config", where=source)
    return {"digest": digest, "config_digest": manifest["config"]["digest"], **found}


def _manifest(source: str, expected: str | None = None) -> tuple[dict[str, Any], str]:
    """The manifest at `source`, or the one of digest `expected` beside it, and its digest."""
    if expected and source.startswith("oci:"):
        # skopeo cannot name a digest in a folder; a blob's file is named by it.
        folder = source.split(":")[1]
        data = (Path(folder) / "blobs" / expected.replace(":", "/")).read_bytes()
    else:
        place = f"docker://{_name_of(source[9:])}@{expected}" if expected else source
        # A digest is of the very bytes: nothing is decoded before it is taken.
        # By itself it waits for ever for a registry that says nothing.
        data = tool_bytes(["skopeo", "--command-timeout=2m", "inspect", "--raw", place])
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if expected and digest != expected:
        raise PostTrainingError(f"its bytes hash to {digest}, not {expected}", where=source)
    try:
        return json.loads(data), digest
    except ValueError:
        raise PostTrainingError("skopeo printed no manifest", where=source) from None


def _name_of(image: str) -> str:
    """Without the tag; a colon before the last slash is a port."""
    folder, slash, last = image.rpartition("/")
    return folder + slash + re.split("[:@]", last)[0]


def _is_digest(lock: dict[str, Any]) -> bool:
    return bool(_DIGEST.fullmatch(lock.get("digest", "")))


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, _SCHEMA)
