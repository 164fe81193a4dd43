"""The SIF that wraps a squashfs: read back by field, and by squashfs-tools at its offset.

tests/long/test_apptainer.py runs one.
"""

import hashlib
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import sha256_file
from post_training.images.identity import IMAGE_FILE, OCI_DIGEST_FILE
from post_training.images.inside import identify_image
from post_training.images.push import PARTITION_AT, make_squashfs, push_sif, write_sif
from post_training.images.render import image_environment
from post_training.images.store import RECORD_SCHEMA, ImageStore

EPOCH = 1767225600
LABELS = {"org.post-training.input-hash": "1" * 64}
ENVIRONMENT = {"PATH": "/opt/post-training/bin:/usr/bin", "LANG": "C.UTF-8"}


@pytest.fixture
def squashfs(tmp_path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_text("hello\n")
    (tree / ".singularity.d/env").mkdir(parents=True)
    for name in ("90-environment.sh", "99-base.sh"):
        (tree / ".singularity.d/env" / name).write_text("")
    make_squashfs(tree, tmp_path / "image.sqsh")
    return tmp_path / "image.sqsh"


@pytest.fixture
def store(tmp_path, squashfs) -> ImageStore:
    """A store with one image, `cpu`."""
    store, digest = ImageStore(tmp_path / "store"), sha256_file(squashfs)
    with store.lock():
        squashfs.rename(store.image_path(digest))
        store.add(
            {
                "schema": RECORD_SCHEMA,
                "name": "cpu",
                "version": "1",
                "platform": "linux/amd64",
                "input_hash": "1" * 64,
                "oci_digest": "sha256:" + "2" * 64,
                "sqsh_sha256": digest,
                "size_bytes": 4096,
                "pushed": "2026-01-01T00:00:00+00:00",
                "labels": LABELS,
                "environment": ENVIRONMENT,
            }
        )
    return store


def wrap(squashfs: Path, target: Path, platform: str = "linux/amd64"):
    return write_sif(squashfs, target, platform=platform, labels=LABELS, environment=ENVIRONMENT)


def field(content: bytes, kind: str, offset: int) -> int:
    return struct.unpack_from(f"<{kind}", content, offset)[0]


def test_sif_header_and_descriptors_are_as_the_format_says(squashfs, tmp_path):
    """Offsets are written out from sif.go and descriptor.go, not taken from the writer."""
    wrap(squashfs, tmp_path / "image.sif")
    content, size = (tmp_path / "image.sif").read_bytes(), squashfs.stat().st_size
    assert content.startswith(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\x0001\x0002\0")
    assert content[48:64] == bytes(16)
    created, modified, free, total, table_at, table_size, data_at, data_size = struct.unpack_from(
        "<8q", content, 64
    )
    assert (created, modified, free, total) == (EPOCH, EPOCH, 46, 48)
    assert (table_at, table_size, data_at) == (4096, 48 * 585, 4096 + 48 * 585)
    assert data_at + data_size == len(content)
    partition, metadata = content[4096:4681], content[4681:5266]
    assert (field(partition, "i", 0), partition[4], field(partition, "I", 5)) == (0x4004, 1, 1)
    offset, recorded = struct.unpack_from("<qq", partition, 17)
    assert (offset, recorded) == (32768, size)
    # squashfs, primary system, amd64.
    assert struct.unpack_from("<ii3s", partition, 585 - 384) == (1, 2, b"02\0")
    assert (field(metadata, "i", 0), metadata[4], field(metadata, "I", 5)) == (0x4006, 1, 2)
    assert metadata[73:201].rstrip(b"\0") == b"inspect-metadata.json"
    at, length = struct.unpack_from("<qq", metadata, 17)
    attributes = json.loads(content[at : at + length])["data"]["attributes"]
    assert attributes["labels"] == LABELS
    [exports] = attributes["environment"].values()
    assert 'export PATH="/opt/post-training/bin:/usr/bin"\n' in exports
    assert not any(content[5266:32768])


def test_sif_holds_the_very_squashfs(squashfs, tmp_path):
    written = wrap(squashfs, tmp_path / "image.sif")
    content = (tmp_path / "image.sif").read_bytes()
    assert written.sif_sha256 == hashlib.sha256(content).hexdigest()
    assert written.sqsh_sha256 == sha256_file(squashfs)
    assert content[PARTITION_AT : PARTITION_AT + squashfs.stat().st_size] == squashfs.read_bytes()
    # squashfs-tools find it there.
    done = subprocess.run(
        ["unsquashfs", "-offset", str(PARTITION_AT), "-cat", tmp_path / "image.sif", "hello"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "hello\n"


def test_sif_of_the_same_image_is_the_same_file(squashfs, tmp_path):
    first = wrap(squashfs, tmp_path / "first.sif")
    os.utime(squashfs, (1, 1))
    assert wrap(squashfs, tmp_path / "second.sif") == first
    other = write_sif(
        squashfs, tmp_path / "third.sif",
        platform="linux/amd64", labels={}, environment=ENVIRONMENT,
    )  # fmt: skip
    assert other.sif_sha256 != first.sif_sha256


def test_sif_other_platforms(squashfs, tmp_path):
    wrap(squashfs, tmp_path / "arm.sif", "linux/arm64")
    content = (tmp_path / "arm.sif").read_bytes()
    assert content[45:48] == content[4096 + 585 - 384 + 8 :][:3] == b"04\0"
    with pytest.raises(PostTrainingError, match="no SIF architecture for 'linux/mips'"):
        wrap(squashfs, tmp_path / "none.sif", "linux/mips")
    assert not (tmp_path / "none.sif").exists()


def test_push_sif_is_recorded_and_found_by_its_digest(store, post_training):
    record = push_sif(store.find("cpu"), store)
    path = store.sif_path(record["sif_sha256"])
    assert sha256_file(path) == record["sif_sha256"]
    assert path.stat().st_size == record["sif_size_bytes"]
    os.umask(umask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o755 & ~umask
    assert store.find(record["sif_sha256"][:10]) == record
    assert store.index()[0]["sif_sha256"] == record["sif_sha256"]
    assert record["oci_digest"].encode() in path.read_bytes()
    assert push_sif(record, store) == record
    verified = post_training("image", "verify", "cpu", "--store", store.folder)
    assert verified.stdout == f"ok: {store.image_path(record['sqsh_sha256'])}\nok: {path}\n"
    path.write_bytes(path.read_bytes()[:-1])
    assert post_training("image", "verify", "cpu", "--store", store.folder).returncode == 1


def test_push_sif_image_in_which_variables_would_be_lost_is_refused(store, tmp_path):
    """Singularity sets what --env gives after 99-base.sh, and without that file not at all."""
    (tmp_path / "tree/.singularity.d/env/99-base.sh").unlink()
    make_squashfs(tmp_path / "tree", tmp_path / "image.sqsh")
    digest = sha256_file(tmp_path / "image.sqsh")
    (tmp_path / "image.sqsh").rename(store.image_path(digest))
    record = {**store.find("cpu"), "sqsh_sha256": digest}
    with pytest.raises(PostTrainingError, match=r"/\.singularity\.d/env/99-base\.sh is not in"):
        push_sif(record, store)
    assert not list(store.folder.glob("*.sif"))


def test_push_sif_damaged_squashfs_is_refused_and_leaves_nothing(store):
    record = store.find("cpu")
    image = store.image_path(record["sqsh_sha256"])
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    with pytest.raises(PostTrainingError, match="the image is corrupt"):
        push_sif(record, store)
    assert not list(store.folder.glob("*.sif")) + list(store.folder.glob(".push-*"))
    assert store.find("cpu") == record


def test_pins_of_a_sif_name_its_own_digest(store):
    record = push_sif(store.find("cpu"), store)
    sif = store.sif_path(record["sif_sha256"])
    pins = image_environment(record, sif)
    assert pins["POST_TRAINING_IMAGE_PATH"] == str(sif)
    assert pins["POST_TRAINING_IMAGE_SIF_SHA256"] == record["sif_sha256"]
    assert pins["POST_TRAINING_IMAGE_SQSH_SHA256"] == record["sqsh_sha256"]
    squashfs = store.image_path(record["sqsh_sha256"])
    assert "POST_TRAINING_IMAGE_SIF_SHA256" not in image_environment(record, squashfs)


def test_entrypoint_in_a_sif_checks_the_sif(store, tmp_path, monkeypatch):
    record = push_sif(store.find("cpu"), store)
    sif = store.sif_path(record["sif_sha256"])
    said = {"name": "cpu", "version": "1", "input_hash": "1" * 64}
    root = tmp_path / "root"
    for file, text in ((IMAGE_FILE, json.dumps(said)), (OCI_DIGEST_FILE, record["oci_digest"])):
        (root / file.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        (root / file.relative_to("/")).write_text(text)
    monkeypatch.setattr("post_training.images.inside.ROOT", root)
    monkeypatch.setattr("post_training.images.inside.FINDINGS", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = identify_image(image_environment(record, sif))
    assert (found["verified_by"], found["check"]) == ("entrypoint", "hashed")
    assert found["sif_sha256"] == record["sif_sha256"]
    store.record_path(record["sqsh_sha256"]).unlink()  # What squashfs is in it is then a claim.
    assert identify_image(image_environment(record, sif))["verified_by"] == "declared"
    sif.write_bytes(sif.read_bytes() + b"x")
    with pytest.raises(PostTrainingError, match="the EDF pins"):
        identify_image(image_environment(record, sif))
