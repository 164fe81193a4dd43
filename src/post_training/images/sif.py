"""SIF, the one-file image of Singularity and Apptainer: a header, a table of objects, the objects.

    0      header          launch line, magic, version, architecture, id, times, where what is
    4096   48 descriptors  585 bytes each: kind, id, offset, size, name, what the kind needs
    32768  squashfs        the primary partition, unchanged
    …      metadata        JSON that `singularity inspect` shows: labels, environment

Written here and not by `apptainer build`, which puts a random id and the time into the header: this
one is a function of the squashfs and its metadata, so equal images are equal files.

Format: https://github.com/sylabs/sif, pkg/sif (sif.go, descriptor.go, create.go); little-endian.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from post_training.core.errors import PostTrainingError
from post_training.images.recipe import SOURCE_DATE_EPOCH

_LAUNCH = b"#!/usr/bin/env run-singularity\n"
# launch line, magic, version, architecture, UUID, created, modified; descriptors free, all, where,
# bytes; data where, bytes.
_HEADER = struct.Struct("<32s10s3s3s16sqqqqqqqq")
# kind, used, id, group, link, offset, size, size with padding, created, modified, uid, gid, name,
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
    """The sha256 of the squashfs that was read and of the SIF that was written."""

    sqsh_sha256: str
    sif_sha256: str


def write_sif(
    squashfs: Path,
    target: Path,
    *,
    platform: str,
    labels: Mapping[str, str],
    environment: Mapping[str, str],
) -> Written:
    """Wrap `squashfs` into a SIF at `target`.

    platform: as OCI writes it, linux/amd64. labels, environment: shown by `singularity inspect`;
    what a container really gets comes from /.singularity.d/env in the squashfs.
    Errors: PostTrainingError for a platform that SIF has no code for here.
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


def _head(partition_bytes: int, metadata_bytes: int, architecture: bytes) -> bytes:
    """Everything before the squashfs."""
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
