"""Whether an image is the pinned one: its digests are compared, so that no variable is believed.

    sha256 of the squashfs            the bytes that run; they are hashed
      /etc/post-training/image.json     in them: name, version, input hash, base, locks
      /etc/post-training/oci-digest     in them: the OCI digest, which `push-sqsh` packed there
    the image store's record          all of these again, compared with the above; and the commit

The commit stands in the record alone: equal inputs give equal bytes, so the image can't hold it. A
seal (a hash over the record) shows that somebody edited it by hand; `image rebuild` builds the
commit and compares. Images pushed by early versions have no oci-digest in them; there the record's
counts.

A large image is hashed once and then known by device, inode, size and times (core/hashing.py).
"""

import json
import os
import stat
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from post_training.core.errors import PostTrainingError, tell
from post_training.core.hashing import file_identity, known_sha256, sha256_value

IMAGE_FILE = Path("/etc/post-training/image.json")
OCI_DIGEST_FILE = Path("/etc/post-training/oci-digest")
_COMPARED = ("name", "version", "input_hash", "base", "base_sha256", "lock_sha256", "platform")
# The variables by which an EDF pins an image: PIN + each of PINNED; and SIF_SHA256 of a SIF, RECORD
# of an image in a registry. PATH is a file, or REGISTRY/NAME@sha256:….
PIN = "POST_TRAINING_IMAGE_"
PINNED = ("PATH", "OCI_DIGEST", "SQSH_SHA256", "INPUT_HASH")
# Where the layer of an image over a site's SIF is mounted (images/layer.py).
LAYER_FOLDERS = ("/opt/post-training", "/etc/post-training")
# A larger file is announced before it is hashed.
_LARGE_BYTES = 2 << 30
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def can_run_here(environment: str | None) -> bool:
    """Whether this is an image, or the training stack is installed and no EDF is named."""
    return IMAGE_FILE.exists() or (environment is None and find_spec("transformers") is not None)


def read_image(root: Path) -> dict[str, Any] | None:
    """The image.json of the image whose files are below `root`, with its `oci_digest` or None.

    None for an image that is not ours. Errors: PostTrainingError for a damaged image.json.
    """
    said = _read(
        root / IMAGE_FILE.relative_to("/"),
        {"name", "version", "input_hash"},
        "name, version or input hash is missing",
    )
    if said is None:
        return None
    digest = root / OCI_DIGEST_FILE.relative_to("/")
    return {**said, "oci_digest": digest.read_text().strip() if digest.exists() else None}


def read_record_beside(image: Path, sqsh_sha256: str) -> dict[str, Any] | None:
    """The record beside an image file; None where the file does not lie in an image store.

    Errors: PostTrainingError for a file that is no record.
    """
    return read_record_at(image.with_name(f"sha256-{sqsh_sha256}.json"))


def read_record_at(path: Path) -> dict[str, Any] | None:
    """An image's record; None where there is none. Errors: PostTrainingError for another file."""
    return _read(path, {"oci_digest"}, "no record of an image: it names no OCI digest")


def _read(path: Path, needed: set[str], problem: str) -> dict[str, Any] | None:
    """A JSON record; None where there is no file.

    needed: keys that it must have. problem: of the error where it lacks one.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PostTrainingError(f"not a JSON record: {error}", where=str(path)) from None
    if not isinstance(record, dict) or not needed <= record.keys():
        raise PostTrainingError(problem, where=str(path))
    return record


def seal(record: Mapping[str, Any]) -> str:
    """The hash over an image's record without its key `seal`."""
    return sha256_value({key: value for key, value in record.items() if key != "seal"})


def check_identity(
    pins: Mapping[str, str], said: Mapping[str, Any] | None, record: Mapping[str, Any] | None
) -> bool:
    """Compare the pins, the image and the record; True where an OCI digest was compared too.

    False: neither the image nor a record holds an OCI digest, so the pinned one is only claimed.
    pins: variables; only POST_TRAINING_IMAGE_* count. said: what `read_image` gave.
    record: the store's; None where it can't be read from here.
    Errors: PostTrainingError where two of the three disagree.
    """
    pinned_inputs = pins.get(f"{PIN}INPUT_HASH")
    if said is None or said["input_hash"] != pinned_inputs:
        raise PostTrainingError(
            f"input hash is {said['input_hash'] if said else 'nothing'}, the EDF pins "
            f"{pinned_inputs}",
            where=str(IMAGE_FILE),
            hint="this is not the image that the EDF was rendered for",
        )
    if record is not None:
        _check_record(record, said, pins)
    known = said["oci_digest"] or (record and record["oci_digest"])
    pinned = pins.get(f"{PIN}OCI_DIGEST")
    if known and known != pinned:
        raise PostTrainingError(
            f"the image's OCI digest is {known}, and {PIN}OCI_DIGEST claims {pinned}",
            where=f"{said['name']} {said['version']}",
            hint="run it with the EDF that was rendered for this image",
        )
    return known is not None


def _check_record(
    record: Mapping[str, Any], said: Mapping[str, Any], pins: Mapping[str, str]
) -> None:
    """Errors: PostTrainingError when the store's record is not that of the image."""
    expected = {key: said[key] for key in _COMPARED if key in said}
    if said["oci_digest"]:
        expected["oci_digest"] = said["oci_digest"]
    for key in ("sqsh_sha256", "sif_sha256"):
        if pinned := pins.get(f"{PIN}{key.upper()}"):
            expected[key] = pinned
    altered = [key for key, value in expected.items() if record.get(key) != value]
    if said["oci_digest"] and record.get("seal") != seal(record):
        altered.append("seal")
    if altered:
        raise PostTrainingError(
            f"the image store's record of {said['name']} {said['version']} is not that of this "
            f"image: {', '.join(altered)}",
            where=str(pins.get(f"{PIN}SQSH_SHA256")),
            hint="the record was changed after the push: `post-training image rebuild` compares",
        )


def image_tag(identity: Mapping[str, Any]) -> str:
    """The tag in the builder's storage of the image that is built with this identity."""
    version = f"{identity['version']}-{identity['input_hash'][:16]}"
    return f"localhost/post-training/{identity['name']}:{version}"


def pair_digest(sif_sha256: str, layer_sha256: str) -> str:
    """What stands for the OCI digest of an image over a site's SIF: a sha256 over both digests."""
    return f"sha256:{sha256_value({'sif': sif_sha256, 'layer': layer_sha256})}"


class ImageDigest(NamedTuple):
    """check: "hashed" (the file was read now) or "cached" (its digest was known)."""

    sha256: str
    check: str


def open_image(path: Path) -> int:
    """Open the image file for reading and return its descriptor.

    Errors: PostTrainingError for what is no file, or cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PostTrainingError(
            "no such image",
            where=str(path),
            hint="`post-training image list` shows the store; `make push-sqsh` adds an image",
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PostTrainingError(f"cannot open the image: {reason}", where=str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise PostTrainingError(f"an image must be a file, and this is {kind}", where=str(path))
    return descriptor


def image_digest(path: Path) -> ImageDigest:
    """sha256 of the file. Where the cache cannot be written the file is simply read each time."""
    descriptor = open_image(path)
    try:
        return open_image_digest(descriptor, path)
    finally:
        os.close(descriptor)


def open_image_digest(descriptor: int, path: Path) -> ImageDigest:
    """As `image_digest`, of the open file, whatever is at `path` by now.

    Errors: PostTrainingError when the file was changed while it was read.
    """
    check = "cached"

    def announce(size_bytes: int) -> None:
        nonlocal check
        check = "hashed"
        if size_bytes > _LARGE_BYTES:
            tell(f"verifying {path} ({size_bytes / 1e9:.0f} GB) …")

    before = image_state(descriptor)
    digest = known_sha256(Path(f"/proc/self/fd/{descriptor}"), announce)
    check_unchanged(descriptor, before, path)
    return ImageDigest(digest, check)


def image_state(descriptor: int) -> tuple[int, ...]:
    """What changes when somebody writes to the open file. Without ctime: a new hard link changes it
    too."""
    *state, _ctime = file_identity(os.fstat(descriptor))
    return tuple(state)


def check_unchanged(descriptor: int, before: tuple[int, ...], path: Path) -> None:
    """Errors: PostTrainingError unless the open file's state is still `before`."""
    if image_state(descriptor) != before:
        raise PostTrainingError("the image was changed while it was verified", where=str(path))


def check_image_digest(path: Path, expected: str) -> ImageDigest:
    """Hash the file. Errors: PostTrainingError when it is not the one that was pinned."""
    return expect_digest(image_digest(path), expected, path)


def expect_digest(digest: ImageDigest, expected: str, path: Path) -> ImageDigest:
    """The digest of the file at `path`. Errors: PostTrainingError when another was pinned."""
    if digest.sha256 != expected:
        raise PostTrainingError(
            f"sha256 is {digest.sha256}, the EDF pins {expected}",
            where=str(path),
            hint="the image is damaged or was replaced: push it again, or render the EDF for it",
        )
    return digest
