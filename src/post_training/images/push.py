"""push-sqsh and push-sif: the built OCI image as a squashfs in the store, with its record; and that
squashfs as a SIF.

Equal images give equal files. Times, owners and the root folder of the squashfs are fixed. The SIF
is written here, not by `apptainer build`, which puts a random id and the time into its header.

A SIF, the image of Singularity and Apptainer, is a header, a table of objects, and the objects:

    0      header          launch line, magic, version, architecture, id, times, where what is
    4096   48 descriptors  585 bytes each: kind, id, offset, size, name, what the kind needs
    32768  squashfs        the primary partition, unchanged
    …      metadata        JSON that `singularity inspect` shows: labels, environment

Format: https://github.com/sylabs/sif, pkg/sif (sif.go, descriptor.go, create.go); little-endian.
"""

import hashlib
import json
import os
import shutil
import signal
import struct
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import new_file_mode, sync
from post_training.core.hashing import sha256_file, sha256_text
from post_training.core.process import run_tool
from post_training.images import builder
from post_training.images.base import parse_dpkg_status
from post_training.images.build import BuiltImage
from post_training.images.checkout import describe_checkout
from post_training.images.identity import OCI_DIGEST_FILE
from post_training.images.recipe import SOURCE_DATE_EPOCH, Recipe
from post_training.images.store import RECORD_SCHEMA, ImageStore

# On an image of 1.66 GB: level 3 makes 469 MiB in 9.5 s, level 15 makes 407 MiB in 65 s.
COMPRESSION = ["-comp", "zstd", "-Xcompression-level", "3"]
_TEMPORARY = ".push-"
# What Singularity takes an image's variables from.
_ENVIRONMENT_FILES = (
    ".singularity.d/env/90-environment.sh",
    ".singularity.d/env/99-base.sh",
)
# `singularity inspect` shows it.
_OCI_DIGEST_LABEL = "org.post-training.oci-digest"
SITE_PACKAGES = "opt/post-training/venv/lib/python3.*/site-packages"
# Other environments: /opt/axolotl of an image over ours, /opt/venv of a registry's base.
_OTHER_SITE_PACKAGES = "opt/*/lib/python3.*/site-packages"
_LAUNCH = b"#!/usr/bin/env run-singularity\n"
# Launch line, magic, version, architecture, UUID, created, modified; of the descriptors: free, all,
# offset, bytes; of the data: offset, bytes.
_HEADER = struct.Struct("<32s10s3s3s16sqqqqqqqq")
# Kind, used, id, group, link, offset, size, size with padding, created, modified, uid, gid, name,
# what the kind needs.
_DESCRIPTOR = struct.Struct("<i?IIIqqqqqqq128s384s")
_PARTITION = struct.Struct("<ii3s")
_DESCRIPTORS_AT, _NUM_DESCRIPTORS = 4096, 48
_DATA_AT = _DESCRIPTORS_AT + _NUM_DESCRIPTORS * _DESCRIPTOR.size
_PAGE_BYTES = 4096
PARTITION_AT = -(-_DATA_AT // _PAGE_BYTES) * _PAGE_BYTES
_KIND_PARTITION, _KIND_JSON = 0x4004, 0x4006
_SQUASHFS, _PRIMARY_SYSTEM = 1, 2
_FIRST_GROUP = 0xF0000001
_ARCHITECTURES = {"linux/amd64": b"02", "linux/arm64": b"04"}
# The name under which Singularity and Apptainer look for it.
_METADATA_NAME = b"inspect-metadata.json"
_CHUNK_BYTES = 1 << 20


class Written(NamedTuple):
    """What `write_sif` read and wrote."""

    sqsh_sha256: str
    sif_sha256: str


class Partition(NamedTuple):
    """The squashfs in a SIF: where it begins, and its sha256."""

    offset: int
    sha256: str


def push_sqsh(image: BuiltImage, recipe: Recipe, store: ImageStore) -> dict[str, Any]:
    """Pack the built image into a squashfs in the store; its record."""
    return pack_sqsh(image, store, describe_checkout(recipe.repository))


def pack_sqsh(
    image: BuiltImage,
    store: ImageStore,
    checkout: dict[str, Any] | None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As `push_sqsh`. checkout: as of `describe_checkout`. more: further keys of the record."""
    with store.lock():
        # Left by a push that was killed: the store is locked, so nobody else pushes now.
        for leftover in store.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        store.remove_abandoned_work()
        with mounted_image(image.tag, store) as root:
            # Inside the store, so that the rename into place is one step on one file system.
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=store.folder) as temporary:
                squashfs = Path(temporary) / "image.sqsh"
                make_squashfs(root, squashfs, image.oci_digest)
                squashfs.chmod(new_file_mode(store.folder))
                # Flushing while hashing saves half a second of a push.
                with ThreadPoolExecutor(max_workers=1) as beside:
                    synced = beside.submit(sync, squashfs)
                    digest = sha256_file(squashfs)
                    synced.result()
                size_bytes = squashfs.stat().st_size
                squashfs.replace(store.image_path(digest))
            record = image_record(image, root, digest, size_bytes, checkout, _builder())
        return store.add({**record, **(more or {})})


def mounted_image(tag: str, store: ImageStore) -> AbstractContextManager[Path]:
    """Mount an image of the builder's, for a push into this store."""
    return builder.mounted(tag, f"post-training-push-{sha256_text(str(store.folder))[:16]}")


def push_sif(record: dict[str, Any], store: ImageStore) -> dict[str, Any]:
    """Wrap the stored squashfs of `record` into a SIF beside it; the record, now with its digest.

    Errors: PostTrainingError when the squashfs is damaged; UsageError when the record lacks what a
    SIF needs.
    """
    if "labels" not in record:
        raise UsageError(
            "its record has no labels: an earlier version of post-training pushed it",
            where=str(store.record_path(record["sqsh_sha256"])),
            hint="build and push it again from today's sources",
        )
    squashfs = store.image_path(record["sqsh_sha256"])
    _check_environment_files(squashfs)
    with store.lock(), tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=store.folder) as folder:
        sif = Path(folder) / "image.sif"
        written = write_sif(
            squashfs,
            sif,
            platform=record["platform"],
            labels={**record["labels"], _OCI_DIGEST_LABEL: record["oci_digest"]},
            environment=record["environment"],
        )
        if written.sqsh_sha256 != record["sqsh_sha256"]:
            raise PostTrainingError(
                f"the image is corrupt: its sha256 is {written.sqsh_sha256}",
                where=str(squashfs),
                hint="remove it and push it again",
            )
        # A SIF begins with a launch line and is a program: who may read it may run it.
        mode = new_file_mode(store.folder)
        sif.chmod(mode | (mode & 0o444) >> 2)
        sync(sif)
        size_bytes = sif.stat().st_size
        sif.replace(store.sif_path(written.sif_sha256))
        record = {**record, "sif_sha256": written.sif_sha256, "sif_size_bytes": size_bytes}
        return store.add(record)


def make_squashfs(
    root: Path, target: Path, oci_digest: str | None = None, *, all_root: bool = False
) -> None:
    """Pack the folder `root` into a squashfs; equal trees give equal bytes.

    oci_digest: written into the squashfs alone: an image can't hold its own digest.
    all_root: every file becomes root's, whoever made it.
    """
    epoch = str(SOURCE_DATE_EPOCH)
    packed = f"{OCI_DIGEST_FILE.relative_to('/')} f 444 0 0 echo {oci_digest}"
    # mksquashfs refuses these flags where SOURCE_DATE_EPOCH is set too.
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    run_tool(
        ["mksquashfs", root, target, "-noappend", "-quiet", "-no-progress", *COMPRESSION,
         "-mkfs-time", epoch, "-all-time", epoch, "-root-mode", "0755",
         *(["-p", packed] if oci_digest else []), *(["-all-root"] if all_root else [])],
        env=environment,
        ends_with_us=signal.SIGKILL,
    )  # fmt: skip


def write_sif(
    squashfs: Path,
    target: Path,
    *,
    platform: str,
    labels: Mapping[str, str],
    environment: Mapping[str, str],
) -> Written:
    """Wrap `squashfs` into a SIF at `target`.

    platform: as OCI writes it, linux/amd64.
    labels, environment: shown by `singularity inspect`. The variables of a container do not come
    from here, but from /.singularity.d/env in the squashfs.
    Errors: PostTrainingError for a platform whose SIF code is not known here.
    """
    if platform not in _ARCHITECTURES:
        raise PostTrainingError(
            f"no SIF architecture for {platform!r}",
            hint=f"there are: {', '.join(sorted(_ARCHITECTURES))}",
        )
    metadata = _metadata(labels, environment)
    size_bytes = squashfs.stat().st_size
    head = _head(size_bytes, len(metadata), _ARCHITECTURES[platform])
    read, written = hashlib.sha256(), hashlib.sha256(head)
    with open(squashfs, "rb") as source, open(target, "wb") as file:
        file.write(head)
        for chunk in _chunks(source):
            read.update(chunk)
            written.update(chunk)
            file.write(chunk)
        if file.tell() != len(head) + size_bytes:
            raise PostTrainingError("its size changed while it was read", where=str(squashfs))
        written.update(metadata)
        file.write(metadata)
    return Written(read.hexdigest(), written.hexdigest())


def sif_partition(sif: Path) -> Partition:
    """Find the primary partition in any SIF, by its table. Errors: PostTrainingError for no SIF."""
    with open(sif, "rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head[32:].startswith(b"SIF_MAGIC"):
            raise PostTrainingError("not a SIF", where=str(sif))
        fields = _HEADER.unpack(head)
        num_descriptors, table_at = fields[8], fields[9]
        file.seek(table_at)
        for _ in range(num_descriptors):
            kind, is_used, _, _, _, offset, size_bytes, *_ = _DESCRIPTOR.unpack(
                file.read(_DESCRIPTOR.size)
            )
            if is_used and kind == _KIND_PARTITION:
                break
        else:
            raise PostTrainingError("no partition is in it", where=str(sif))
        file.seek(offset)
        digest, left = hashlib.sha256(), size_bytes
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return Partition(offset, digest.hexdigest())


def image_record(
    image: BuiltImage,
    root: Path,
    sqsh_sha256: str,
    size_bytes: int,
    checkout: dict[str, Any] | None,
    builder: dict[str, str],
) -> dict[str, Any]:
    """The record beside an image: what is in it, what it was made from and with, and when.

    root: the image's root file system, from which the lists of packages are read.
    checkout: as of `describe_checkout`. builder: {program: version}.
    """
    others = {
        f"/{folder.relative_to(root).parents[2]}": python_packages([folder])
        for folder in sorted(root.glob(_OTHER_SITE_PACKAGES))
    }
    return {
        "schema": RECORD_SCHEMA,
        **image.identity,
        "oci_digest": image.oci_digest,
        "sqsh_sha256": sqsh_sha256,
        "size_bytes": size_bytes,
        "checkout": checkout,
        "pushed": datetime.now(UTC).isoformat(timespec="seconds"),
        "compression": " ".join(COMPRESSION),
        "builder": builder,
        "labels": image.labels,
        "environment": image.environment,
        "packages": {
            "debian": parse_dpkg_status((root / "var/lib/dpkg/status").read_text()),
            "python": python_packages(root.glob(SITE_PACKAGES)),
            **others,
        },
    }


def python_packages(folders: Iterable[Path]) -> dict[str, str]:
    """{name: version} of what is installed in these folders of packages, sorted."""
    found = metadata.distributions(path=[str(folder) for folder in folders])
    return dict(sorted((each.name, each.version) for each in found))


def _builder() -> dict[str, str]:
    return {
        **builder.version(),
        "mksquashfs": run_tool(["mksquashfs", "-version"]).splitlines()[0],
    }


def _check_environment_files(squashfs: Path) -> None:
    """Errors: PostTrainingError when Singularity would silently ignore variables in this image."""
    listed = run_tool(["unsquashfs", "-ls", squashfs, *_ENVIRONMENT_FILES]).splitlines()
    for name in _ENVIRONMENT_FILES:
        if not any(line.endswith(f"/{name}") for line in listed):
            raise PostTrainingError(
                f"/{name} is not in the image",
                where=str(squashfs),
                hint="Singularity takes the image's variables and --env from there; "
                "containers/cpu/Dockerfile writes both files",
            )


def _head(partition_bytes: int, metadata_bytes: int, architecture: bytes) -> bytes:
    """Everything before the squashfs: header, descriptors, padding."""
    partition = _DESCRIPTOR.pack(
        _KIND_PARTITION, True, 1, _FIRST_GROUP, 0,
        PARTITION_AT, partition_bytes, PARTITION_AT - _DATA_AT + partition_bytes,
        SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH, 0, 0, b"image.sqsh",
        _PARTITION.pack(_SQUASHFS, _PRIMARY_SYSTEM, architecture),
    )  # fmt: skip
    metadata = _DESCRIPTOR.pack(
        _KIND_JSON, True, 2, _FIRST_GROUP, 0,
        PARTITION_AT + partition_bytes, metadata_bytes, metadata_bytes,
        SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH, 0, 0, _METADATA_NAME, b"",
    )  # fmt: skip
    header = _HEADER.pack(
        _LAUNCH, b"SIF_MAGIC", b"01", architecture,
        bytes(16),  # The nil UUID, as the reference implementation's deterministic images have.
        SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH,
        _NUM_DESCRIPTORS - 2, _NUM_DESCRIPTORS,
        _DESCRIPTORS_AT, _NUM_DESCRIPTORS * _DESCRIPTOR.size,
        _DATA_AT, PARTITION_AT - _DATA_AT + partition_bytes + metadata_bytes,
    )  # fmt: skip
    return (header.ljust(_DESCRIPTORS_AT, b"\0") + partition + metadata).ljust(PARTITION_AT, b"\0")


def _metadata(labels: Mapping[str, str], environment: Mapping[str, str]) -> bytes:
    exports = "".join(f'export {name}="{value}"\n' for name, value in environment.items())
    attributes: dict[str, Any] = {
        "labels": dict(labels),
        "environment": {"/.singularity.d/env/90-environment.sh": exports},
    }
    value = {"data": {"attributes": attributes}, "type": "container"}
    return json.dumps(value, sort_keys=True).encode()


def _chunks(source: IO[bytes]):
    while chunk := source.read(_CHUNK_BYTES):
        yield chunk
